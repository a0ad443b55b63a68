"""Ada-KV: the heads of a layer compete for its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.allocations._competition import CERTAIN, EMPTY, best_first, safe, won
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.spec import knob


@ALLOCATIONS.register("ada")
@dataclass(frozen=True)
class Ada(Allocation):
    """Rank the tokens of all heads of a layer together, and keep the best, in whatever head.

    The budget is what a head holds on average. Every head keeps its sinks and its window, and of
    the rest of its share at least the part `floor`. With `normalize` a head's scores are first
    multiplied by the part of their sum that lies in its best tokens, as many as its share: heads
    whose attention is spread give way. Equal scores: the lower head's first, then the older.
    `counting="reference"` follows KVCache-Factory, whose rounding lets the total drift by a token a
    head.

    Source: Feng et al. 2024, arXiv:2407.11550, algorithm 1; `AdaKVCluster` of KVCache-Factory for
    normalisation, `AdaKVPress` of kvpress for the exact total.
    """

    source: ClassVar[str] = "arXiv:2407.11550"
    compete: ClassVar[Literal["none", "layer", "model"]] = "layer"

    floor: float = knob(0.2, "part of its share that every head keeps", least=0, most=1)
    normalize: bool = knob(
        True, "damp heads whose scores are spread; scores below zero count for none"
    )
    counting: Literal["exact", "reference"] = knob(
        "exact", "an exact total, or the rounding of KVCache-Factory"
    )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """All alike, until there is something to compete for."""
        return facts.even(budget)

    def at_eviction(
        self, scores: Sequence[Tensor], limits: Sequence[Tensor], floor: int
    ) -> list[Tensor]:
        """See the base; a layer that holds no more than its limits keeps all."""
        return [
            self._in_layer(best_first(score), limit, floor)
            for score, limit in zip(scores, limits, strict=True)
        ]

    def _in_layer(self, ranked: Tensor, limit: Tensor, floor: int) -> Tensor:
        worth = _concentrated(ranked, limit) if self.normalize else ranked
        certain = safe(ranked, limit, 0)
        if self.counting == "reference":
            return self._rounded(worth, limit, certain)
        least = certain + ((limit - certain).double() * self.floor).long()
        return won([worth], [limit], [safe(ranked, limit, least.clamp_min(floor))])[0]

    def _rounded(self, worth: Tensor, limit: Tensor, certain: Tensor) -> Tensor:
        """Steps 4 to 6 of KVCache-Factory: what is won, and a part of the mean, each rounded."""
        held = (worth > EMPTY).sum(-1)
        drawn = won([worth], [limit], [certain])[0] - certain
        kept = ((limit - certain).double() * self.floor).long()
        share = (drawn.float() * (1 - self.floor) + kept).round().long() + certain
        fits = held.sum(-1, keepdim=True) <= limit.sum(-1, keepdim=True)
        return torch.where(fits, held, share.minimum(held))


def _concentrated(ranked: Tensor, limit: Tensor) -> Tensor:
    """Scores times the part of their sum that the first `limit` of each head hold."""
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    counted = (ranked < CERTAIN) & (ranked > 0)
    mass = ranked.masked_fill(~counted, 0.0)
    whole = mass.sum(-1)
    best = mass.masked_fill(rank >= limit[..., None], 0.0).sum(-1)
    part = torch.where(whole > 0, best / whole, 1.0)[..., None]
    return torch.where(counted, ranked * part, ranked)
