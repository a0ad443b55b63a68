"""A model fed through one cache, or through several at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvhive.cache import reading
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.reconstruction import reconstructed
from kvhive.inference.shared_prefill import SharedPrefill, SharedStep, can_join
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
        cache: HiveCache,
        ids: Tensor,
        keep: int = 1,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `kvhive.cache.reading.step`: logits `[rows, keep, vocabulary]`."""
        return reading.step(self.model, cache, ids, keep, mask, positions)

    def step_together(
        self, caches: Sequence[HiveCache], rows: Sequence[int], ids: Tensor, keep: int = 1
    ) -> Tensor:
        """`step` of several caches: the batch is `rows[i]` rows of cache i, one after the other.

        All must have seen equally many tokens. Caches that cannot share a step take one each.
        """
        if len(caches) == 1:
            return self.step(caches[0], ids, keep)
        if all(can_join(cache) for cache in caches):
            return self._shared_step(caches, rows, ids, keep)
        parts = zip(caches, ids.split(list(rows)), strict=True)
        return torch.cat([self.step(cache, part, keep) for cache, part in parts])

    def prefill_together(self, caches: Sequence[HiveCache], ids: Tensor) -> Tensor:
        """Several empty caches read one prompt in one pass; see `SharedPrefill`."""
        return forward(self.model, SharedPrefill(caches), ids)

    def _shared_step(
        self, caches: Sequence[HiveCache], rows: Sequence[int], ids: Tensor, keep: int
    ) -> Tensor:
        """One step for all, and then the second pass of each cache that asks for one."""
        with ExitStack() as after:
            for cache, part in zip(caches, ids.split(list(rows)), strict=True):
                after.enter_context(reconstructed(self.model, cache, part))
            logits = forward(self.model, SharedStep(caches, rows), ids, keep)
        return logits
