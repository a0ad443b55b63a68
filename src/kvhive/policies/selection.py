"""The few ways to choose slots that many policies share. Pure functions on `[b, K, n]` tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.slots import Slots


def sinks(slots: Slots, size: int) -> Tensor:
    """bool: the first `size` tokens each head holds (padding does not count)."""
    rank = slots.rank
    return (rank >= 0) & (rank < size)


def recent(slots: Slots, size: Tensor | int) -> Tensor:
    """bool: the last `size` tokens each head holds; size an int, or int `[b, K]`."""
    size = size[..., None] if isinstance(size, Tensor) else size
    rank = slots.rank
    return (rank >= 0) & (rank >= slots.length - (slots.length - slots.count)[..., None] - size)


def keep_top(score: Tensor, candidates: Tensor, number: Tensor, newer_first: bool = False) -> Tensor:
    """bool: the `number` (int `[b, K]`) best-scored candidates of each head.

    Ties go to the older token, or to the newer one if `newer_first`. A stable sort and not `topk`,
    which leaves the order of ties open, so that results would differ between devices.
    """
    score = score.float().masked_fill(~candidates, float("-inf"))
    if newer_first:
        score = score.flip(-1)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    if newer_first:
        place = place.flip(-1)
    return candidates & (place < number[..., None])
