"""A model fed through one cache, or through several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.shared_prefill import SharedStep, can_join
from kvhive.model.forward import chunks, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Driver", "chunks"]


@dataclass(frozen=True)
class Driver:
    """A model that is fed through caches, step by step; gradients are never recorded."""

    model: PreTrainedModel

    def step(
        self,
        cache: Cache,
        ids: Tensor,
        keep: int = 1,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `kvhive.model.forward.forward`: logits `[rows, keep, vocabulary]`."""
        return forward(self.model, cache, ids, keep, mask, positions)

    def step_together(
        self, caches: Sequence[HiveCache], rows: Sequence[int], ids: Tensor, keep: int = 1
    ) -> Tensor:
        """`step` of several caches: the batch is `rows[i]` rows of cache i, one after the other.

        All must have seen equally many tokens. Caches that cannot share a step take one each.
        """
        if len(caches) == 1:
            return self.step(caches[0], ids, keep)
        if all(can_join(cache) for cache in caches):
            return self.step(SharedStep(caches, rows), ids, keep)
        parts = zip(caches, ids.split(list(rows)), strict=True)
        return torch.cat([self.step(cache, part, keep) for cache, part in parts])
