"""Shares that are written out, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.allocations._rounding import apportion
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.spec import knob


@ALLOCATIONS.register("per_layer")
@dataclass(frozen=True)
class PerLayer(Allocation):
    """Share the budget out in proportion to `weights`, one for each compressed layer.

    The mean over layers is the budget, the total exact. No layer gets less than the policy needs,
    nor, where the row has read more than the budget, more than the row has read; the others divide
    the rest by their weights. Only ratios count: [3, 1] is [6, 2].
    """

    weights: tuple[float, ...] = knob(
        (), "one number for each compressed layer, from the first on; none: all alike", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and not any(self.weights):
            raise ValueError("per_layer: weights must not all be 0, give at least one above it")

    def check(self, layers: int) -> None:
        """See the base."""
        if self.weights and len(self.weights) != layers:
            raise ValueError(
                f"per_layer: weights must be one number for each of the {layers} compressed "
                f"layers, got {len(self.weights)}"
            )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base; the same for all heads of a layer."""
        self.check(facts.layers)
        weights = torch.tensor(self.weights or (1.0,) * facts.layers, dtype=torch.float64)
        most = facts.seen if facts.seen > budget else None
        by_layer = apportion(weights, budget * facts.layers, floor, most)
        return by_layer[:, None].expand(-1, facts.kv_heads).clone()
