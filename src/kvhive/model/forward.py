"""The one place where a model is called: ids and a cache go in, logits come out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
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


def prefill(
    model: PreTrainedModel,
    kv_cache: Cache,
    ids: Tensor,
    chunk: int | None = None,
    mask: Tensor | None = None,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    """Feed int64 ids `[rows, tokens]`, `chunk` at a time; logits `[rows, vocabulary]` of the token
    that comes next.

    chunk: tokens to a step, after each of which the cache evicts; None: all in one step. mask:
    int64 `[rows, seen + tokens]`, 0 for padding. tick: gets the share that has been read. Raises
    `ValueError` for a chunk below 1, and for no ids.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    tokens = ids.shape[1]
    if not tokens:
        raise ValueError("there is nothing to read: give at least 1 token id")
    for start, stop in chunks(tokens, chunk):
        padding = () if mask is None else _padding(mask, stop - tokens, stop - start)
        logits = forward(model, kv_cache, ids[:, start:stop], 1, *padding)
        if tick is not None:
            tick(stop / tokens)
    return logits[:, -1]


def chunks(length: int, size: int | None = None, from_end: bool = False) -> list[tuple[int, int]]:
    """(start, stop) of the steps that feed `length` tokens, `size` at a time; None: all at once.

    What is left over is the last step; from_end: the first one.
    """
    size = max(1, size or length)
    marks = range(length, 0, -size) if from_end else range(0, length, size)
    return list(pairwise(sorted({0, *marks, length})))


def _padding(mask: Tensor, left: int, fresh: int) -> tuple[Tensor, Tensor]:
    """Mask and positions of a step that brings `fresh` tokens and ends `-left` before the last."""
    upto = mask[:, : mask.shape[1] + left]
    return upto, (upto.long().cumsum(1) - 1).clamp_min(0)[:, -fresh:]


@cache
def _takes_keep(kind: Hashable) -> bool:
    """Whether models of this class can leave out the logits that nobody wants."""
    taken = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return "logits_to_keep" in taken
