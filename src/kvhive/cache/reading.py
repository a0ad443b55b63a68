"""What a cache reads: ids and their padding, checked against what it has seen, and fed in steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.progress import Progress
from kvhive.cache.reconstruction import check_fits, reconstructed
from kvhive.model.forward import chunks, forward, padding


def step(
    model: PreTrainedModel,
    cache: HiveCache,
    ids: Tensor,
    keep: int = 1,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """As `kvhive.model.forward.forward`, with the second pass where the policy asks for one.

    Raises `ValueError` for a pass that leads beyond the length the model was trained on.
    """
    with reconstructed(model, cache, ids, mask):
        logits = forward(model, cache, ids, keep, mask, positions)
    return logits


def prefill(
    model: PreTrainedModel,
    cache: HiveCache,
    ids: Tensor,
    chunk: int | None = None,
    mask: Tensor | None = None,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    """Feed int64 ids `[rows, tokens]`, `chunk` at a time; logits `[rows, vocabulary]` of the token
    that comes next.

    chunk: tokens to a step, after each of which the cache evicts; None: all in one step. mask:
    int64 `[rows, seen + tokens]`, 0 for padding. tick: gets the share that has been read. Raises
    `ValueError` for a chunk below 1, for no ids, and as `step`.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    tokens = ids.shape[1]
    if not tokens:
        raise ValueError("there is nothing to read: give at least 1 token id")
    if cache.positions == "original":  # else it depends on what is held when a step begins
        check_fits(cache, cache.progress.seen + tokens, min(chunk or tokens, tokens))
    try:
        for start, stop in chunks(tokens, chunk):
            cache.progress.more = stop < tokens
            padded = () if mask is None else padding(mask, stop - tokens, stop - start)
            logits = step(model, cache, ids[:, start:stop], 1, *padded)
            if tick is not None:
                tick(stop / tokens)
    finally:
        cache.progress.more = False
    return logits[:, -1]


def check_reading(ids: Tensor, mask: Tensor | None, progress: Progress) -> None:
    """Raises `ValueError` unless ids are `[rows, tokens]` and the mask covers them, and all tokens
    seen before, with padding on the left alone.
    """
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            "read: input_ids must be token ids [rows, tokens], at least one, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    if mask is None:
        if progress.rows is not None:
            raise ValueError(
                "read: this cache holds a padded batch; give attention_mask [rows, seen + tokens] "
                f"for the {progress.seen} tokens seen and these"
            )
        return
    wanted = (len(ids), progress.seen + ids.shape[1])
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"read: attention_mask must have the shape {wanted} (rows, tokens seen before and "
            f"these), got {tuple(mask.shape)}"
        )
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "read: a row ends in padding; pad on the left (tokenizer.padding_side = 'left'), so "
            "that what comes next follows the last token of every row"
        )
