"""The one place where a model is called: ids and a cache go in, logits come out."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


@torch.no_grad()
def forward(
    model: PreTrainedModel,
    kv_cache: Cache,
    ids: Tensor,
    keep: int = 1,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Feed int64 ids `[rows, tokens]`; logits `[rows, keep, vocabulary]` after the last `keep`.

    mask: int64 `[rows, seen + tokens]`, 0 for padding; positions: int64 `[rows, tokens]`; None for
    rows without padding. Any device.
    """
    device = model.device
    padding = {"attention_mask": mask, "position_ids": positions}
    options: dict[str, Any] = {
        name: given.to(device) for name, given in padding.items() if given is not None
    }
    kind: Any = type(model)  # mypy takes the objects' __hash__ for the class's own
    if _takes_keep(kind):
        options["logits_to_keep"] = keep
    output: Any = model(
        input_ids=ids.to(device), past_key_values=kv_cache, use_cache=True, **options
    )
    logits: Tensor = output.logits[:, -keep:]
    return logits


@torch.no_grad()
def last_hidden(model: PreTrainedModel, kv_cache: Cache, ids: Tensor) -> Tensor:
    """Feed int64 ids `[rows, tokens]`; hidden states after the last norm, `[rows, tokens, d]`."""
    output: Any = model.base_model(
        input_ids=ids.to(model.device), past_key_values=kv_cache, use_cache=True
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def chunks(length: int, size: int | None = None, from_end: bool = False) -> list[tuple[int, int]]:
    """(start, stop) of the steps that feed `length` tokens, `size` at a time; None: all at once.

    What is left over is the last step; from_end: the first one.
    """
    size = max(1, size or length)
    marks = range(length, 0, -size) if from_end else range(0, length, size)
    return list(pairwise(sorted({0, *marks, length})))


def padding(mask: Tensor, left: int, fresh: int) -> tuple[Tensor, Tensor]:
    """Mask and positions of a step that brings `fresh` tokens and ends `-left` before the last."""
    upto = mask[:, : mask.shape[1] + left]
    return upto, (upto.long().cumsum(1) - 1).clamp_min(0)[:, -fresh:]


@cache
def _takes_keep(kind: Hashable) -> bool:
    """Whether models of this class can leave out the logits that nobody wants."""
    taken = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return "logits_to_keep" in taken
