"""The allocations, by name."""

from kvhive.allocations import uniform
from kvhive.allocations.base import ALLOCATIONS, Allocation, Shape

__all__ = ["ALLOCATIONS", "Allocation", "Shape"]
_BUILT_IN = (uniform,)
