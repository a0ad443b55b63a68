"""The allocations, by name. A new one is a new file here."""

from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.registry import import_all

__all__ = ["ALLOCATIONS", "Allocation", "Facts"]

import_all(__name__, __path__)
