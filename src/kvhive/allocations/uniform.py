"""Uniform allocation: every head of every layer gets the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """The budget as it is, for every head of every layer."""

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """All entries equal `budget`."""
        return facts.even(budget)
