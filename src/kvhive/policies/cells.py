"""Cells: runs of neighbouring tokens of which one, the local heavy hitter, survives. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.slots import Slots


def winners(cell: Tensor, member: Tensor, score: Tensor | None) -> Tensor:
    """One slot of every cell: the best-scored member, ties to the oldest; without scores the oldest.

    cell: int64 `[b, K, n]`, the cell each member belongs to, in 0..n-1. member: bool `[b, K, n]`.
    Returns bool `[b, K, n]`.
    """
    n = cell.shape[-1]
    cell = torch.where(member, cell, n)  # everything else goes to a cell of its own, never read
    if score is not None:
        score = score.float()
        best = score.new_full((*cell.shape[:-1], n + 1), float("-inf"))
        best.scatter_reduce_(-1, cell, score, "amax")
        member = member & (score == best.gather(-1, cell))
    slot = torch.arange(n, device=cell.device).expand_as(cell)
    first = slot.new_full((*cell.shape[:-1], n + 1), n)
    first.scatter_reduce_(-1, cell, torch.where(member, slot, n), "amin")
    return member & (slot == first.gather(-1, cell))


def ranks(alive: Tensor) -> Tensor:
    """int64 `[b, K, n]`: place among the slots alive (bool), counted from 0; meaningless elsewhere."""
    return alive.cumsum(-1) - 1


def event(
    alive: Tensor,
    sample: Tensor,
    length: Tensor,
    score: Tensor | None,
    sink: Tensor,
    window: Tensor,
    stride: Tensor,
    old_stride: int,
) -> tuple[Tensor, Tensor]:
    """One BUZZ event on the first `length` tokens alive, laid out as sinks | sample | fresh | window.

    The old sample is thinned by place (every `old_stride`-th entry stays), the fresh tokens are cut
    into blocks of `stride` and the winner of each stays. Shapes: alive and score `[b, K, n]`, all others
    int64 `[b, K]`. Returns the slots alive afterwards and the new sample size.
    """
    rank = ranks(alive)
    old_end = (sink + sample)[..., None]
    fresh_end = (length - window)[..., None]
    place = rank - sink[..., None]
    in_old = alive & (place >= 0) & (rank < old_end)
    in_fresh = alive & (rank >= old_end) & (rank < fresh_end)
    block = ((rank - old_end) // stride[..., None]).clamp_min(0)
    picked = winners(block, in_fresh, score)
    stay = (alive & ~in_old & ~in_fresh) | (in_old & (place % old_stride == 0)) | picked
    fresh = (length - window - sink - sample).clamp_min(0)
    return stay, ceil_div(sample, old_stride) + ceil_div(fresh, stride)


def thin(alive: Tensor, sample: Tensor, sink: Tensor, old_stride: int) -> tuple[Tensor, Tensor]:
    """Keep every `old_stride`-th entry of the sample. Shapes as in `event`."""
    rank = ranks(alive)
    place = rank - sink[..., None]
    in_sample = (place >= 0) & (place < sample[..., None])
    return alive & (~in_sample | (place % old_stride == 0)), ceil_div(sample, old_stride)


def fold_generations(
    alive: Tensor, level: Tensor, score: Tensor | None, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge cells, oldest pairs first, until no generation holds more than `cells` of them.

    alive: bool `[b, K, n]`; level: int64 `[b, K, n]`, the generation of the cell a slot stands for, 0
    for tokens that are not history; cells: int64 `[b, K]`. A merged pair moves up one generation and
    its better member (ties: the older) survives. Returns alive and level afterwards.
    """
    generation = 1
    while bool((alive & (level >= generation)).any()):
        members = alive & (level == generation)
        excess = (members.sum(-1) - cells).clamp_min(0)
        place = ranks(members)
        paired = members & (place < 2 * ceil_div(excess, 2)[..., None])
        stay = winners((place // 2).clamp_min(0), paired, score)
        alive = alive & (~paired | stay)
        level = torch.where(stay, generation + 1, level)
        generation += 1
    return alive, level


def merge_oldest(alive: Tensor, level: Tensor, score: Tensor | None, most: Tensor) -> Tensor:
    """Merge the oldest cells into one, so that at most `most` (int64 `[b, K]`, >= 1) remain."""
    history = alive & (level > 0)
    excess = (history.sum(-1) - most).clamp_min(0)
    merged = history & (ranks(history) <= excess[..., None]) & (excess > 0)[..., None]
    return alive & (~merged | winners(torch.zeros_like(level), merged, score))


def ceil_div(number: Tensor, by: Tensor | int) -> Tensor:
    """Integer division, rounded up."""
    return -(-number // by)


def tokens_seen(slots: Slots) -> Tensor:
    """int64 `[b, K]`: tokens a row has seen, by the position of its newest slot."""
    return slots.position[..., -1].long() + 1
