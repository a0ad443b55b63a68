"""The allocations, by name."""

from kvhive.allocations import uniform
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts

__all__ = ["ALLOCATIONS", "Allocation", "Facts"]
_BUILT_IN = (uniform,)
