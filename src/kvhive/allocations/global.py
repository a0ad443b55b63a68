"""Global allocation: all heads of all layers compete for one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvhive.allocations._competition import best_first, safe, won
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.spec import knob


@ALLOCATIONS.register("global")
@dataclass(frozen=True)
class GlobalShares(Allocation):
    """Rank the tokens of all heads of all layers together, and keep the best, wherever they lie.

    The budget is what a head holds on average; the total is exact. Every head keeps its sinks and
    its window, and its best tokens up to `floor` of that average. Scores are compared as they are,
    so the policy's should mean the same in every head, as sums of attention do. Equal scores: the
    lower layer's first, then the lower head's, then the older.

    Source: ours; within a layer it is the rule of Ada-KV, Feng et al. 2024, arXiv:2407.11550.
    """

    compete: ClassVar[Literal["none", "layer", "model"]] = "model"

    floor: float = knob(0.2, "share of the mean that every head keeps", least=0, most=1)

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """All alike, until there is something to compete for."""
        return facts.even(budget)

    def at_eviction(
        self, scores: Sequence[Tensor], limits: Sequence[Tensor], floor: int
    ) -> list[Tensor]:
        """See the base; a row that holds no more than its limits keeps all."""
        ranked = [best_first(one) for one in scores]
        least = [(limit.double() * self.floor).long().clamp_min(floor) for limit in limits]
        sure = [safe(*parts) for parts in zip(ranked, limits, least, strict=True)]
        return won(ranked, limits, sure)
