"""Cells: runs of neighbouring tokens of which one, the local heavy hitter, survives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.policies._parts.regions import Regions
from kvhive.slots import Slots


def choose(
    which: Tensor, this: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Slots alive and sample size: `this` for heads in `which` (bool `[b, K]`), else `other`."""
    return torch.where(which[..., None], this[0], other[0]), torch.where(which, this[1], other[1])


def winners(cell: Tensor, member: Tensor, score: Tensor | None) -> Tensor:
    """One slot of every cell: its best-scored member (ties: the oldest); without scores the oldest.

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


def neighbours(slots: Slots, size: int) -> Tensor:
    """int64 `[b, K, n]`: the run of `size` positions each slot lies in, numbered from 0 as they are
    held; empty slots are in runs of their own.
    """
    run = slots.position.div(size, rounding_mode="floor")
    return F.pad((run[..., 1:] != run[..., :-1]).cumsum(-1), (1, 0))


def ranks(alive: Tensor) -> Tensor:
    """int64 `[b, K, n]`: place among the slots alive (bool) from 0; meaningless elsewhere."""
    return alive.cumsum(-1) - 1


def event(
    alive: Tensor,
    sample: Tensor,
    length: Tensor,
    score: Tensor | None,
    regions: Regions,
    stride: Tensor,
    old_stride: int,
) -> tuple[Tensor, Tensor]:
    """One BUZZ event on the first `length` tokens alive: sinks | sample | fresh | window.

    The old sample is thinned by place (every `old_stride`-th entry stays), the fresh tokens are cut
    into blocks of `stride` and the winner of each stays. Shapes: alive and score `[b, K, n]`, all
    others int64 `[b, K]`. Returns the slots alive afterwards and the new sample size.
    """
    rank, sink = ranks(alive), regions.sink
    old_end = (sink + sample)[..., None]
    place = rank - sink[..., None]
    in_old = alive & (place >= 0) & (rank < old_end)
    in_fresh = alive & (rank >= old_end) & (rank < (length - regions.window)[..., None])
    block = ((rank - old_end) // stride[..., None]).clamp_min(0)
    picked = winners(block, in_fresh, score)
    stay = (alive & ~in_old & ~in_fresh) | (in_old & (place % old_stride == 0)) | picked
    fresh = (length - regions.window - sink - sample).clamp_min(0)
    return stay, ceil_div(sample, old_stride) + ceil_div(fresh, stride)


def thin(alive: Tensor, sample: Tensor, sink: Tensor, old_stride: int) -> tuple[Tensor, Tensor]:
    """Keep every `old_stride`-th entry of the sample. Shapes as in `event`."""
    rank = ranks(alive)
    place = rank - sink[..., None]
    in_sample = (place >= 0) & (place < sample[..., None])
    return alive & (~in_sample | (place % old_stride == 0)), ceil_div(sample, old_stride)


def close_cells(
    alive: Tensor,
    level: Tensor,
    sample: Tensor,
    score: Tensor | None,
    regions: Regions,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make each whole block of `stride` fresh tokens a cell of generation 1; one token of it stays.

    Layout: sinks | history (`sample` tokens, level >= 1) | fresh | window. Shapes: alive, level and
    score `[b, K, n]`, sample int64 `[b, K]`. Returns the slots alive afterwards, their levels, and
    how many fresh tokens were left over (int64 `[b, K]`, fewer than `stride`).
    """
    start = regions.sink + sample
    fresh = (alive.sum(-1) - start - regions.window).clamp_min(0)
    loose = fresh % stride
    place = ranks(alive) - start[..., None]
    inside = alive & (place >= 0) & (place < (fresh - loose)[..., None])
    picked = winners((place // stride).clamp_min(0), inside, score)
    return alive & (~inside | picked), torch.where(picked, 1, level), loose


def fold_generations(
    alive: Tensor, level: Tensor, score: Tensor | None, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge cells, oldest pairs first, until no generation holds more than `cells` of them.

    alive: bool `[b, K, n]`; level: int64 `[b, K, n]`, the generation of the cell a slot stands for,
    0 for tokens that are not history; cells: int64 `[b, K]`. A merged pair moves up one generation
    and its better member (ties: the older) survives. Returns alive and level afterwards.
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


def merge_oldest(
    alive: Tensor, level: Tensor, score: Tensor | None, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge the oldest cells into one, so that at most `most` (int64 `[b, K]`, >= 1) remain.

    The merged cell is of the generation of its oldest part, so that neither generations nor numbers
    of cells depend on scores. Shapes as in `fold_generations`. Returns alive and level afterwards.
    """
    history = alive & (level > 0)
    excess = (history.sum(-1) - most).clamp_min(0)[..., None]
    merged = history & (ranks(history) <= excess) & (excess > 0)
    stay = winners(torch.zeros_like(level), merged, score)
    oldest = torch.where(merged, level, 0).amax(-1, keepdim=True)
    return alive & (~merged | stay), torch.where(stay, oldest, level)


def ceil_div(number: Tensor, by: Tensor | int) -> Tensor:
    """Integer division, rounded up."""
    return -(-number // by)


def tokens_seen(slots: Slots) -> Tensor:
    """int64 `[b, K]`: tokens a row has seen, by the position of its newest token."""
    return slots.position.amax(-1).long() + 1
