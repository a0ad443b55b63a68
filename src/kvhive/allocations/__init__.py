"""The allocations, by name."""

from kvhive.allocations import uniform
from kvhive.allocations.base import ALLOCATIONS, Allocation

__all__ = ["ALLOCATIONS", "Allocation"]
_BUILT_IN = (uniform,)
