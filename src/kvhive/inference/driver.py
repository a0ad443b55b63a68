"""The one place where a model is called: ids and a cache go in, logits come out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.shared_prefill import SharedStep, can_join

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Driver:
    """A model that is fed through caches, step by step; gradients are never recorded."""

    model: PreTrainedModel

    @torch.no_grad()
    def step(
        self,
        cache: Cache,
        ids: Tensor,
        keep: int = 1,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Feed int64 ids `[rows, tokens]`; logits `[rows, keep, vocabulary]` after the last `keep`.

        mask: int64 `[rows, seen + tokens]`, 0 for padding; positions: int64 `[rows, tokens]`; None
        for rows without padding. Any device.
        """
        device = self.model.device
        padding = {"attention_mask": mask, "position_ids": positions}
        options: dict[str, Any] = {
            name: given.to(device) for name, given in padding.items() if given is not None
        }
        if self._takes_keep:
            options["logits_to_keep"] = keep
        output: Any = self.model(
            input_ids=ids.to(device), past_key_values=cache, use_cache=True, **options
        )
        logits: Tensor = output.logits[:, -keep:]
        return logits

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

    @cached_property
    def _takes_keep(self) -> bool:
        """Whether the model can leave out the logits that nobody wants."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


def chunks(length: int, size: int | None = None, from_end: bool = False) -> list[tuple[int, int]]:
    """(start, stop) of the steps that feed `length` tokens, `size` at a time; None: all at once.

    What is left over is the last step; from_end: the first one.
    """
    size = max(1, size or length)
    marks = range(length, 0, -size) if from_end else range(0, length, size)
    return list(pairwise(sorted({0, *marks, length})))
