"""Uniform allocation: every head of every layer gets the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.allocations.base import ALLOCATIONS, Allocation


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """The budget as it is, for every head of every layer."""

    def spread(self, budget: int, layers: int, kv_heads: int, least: int) -> Tensor:
        """All entries equal `budget`."""
        return torch.full((layers, kv_heads), budget)
