"""Rows of any lengths, one after another in one flat array, each with room to grow: where their
tokens lie, and how they move. Row r holds slots `starts[r]` to `starts[r] + lengths[r] - 1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.memory import zeros

SPARE = 32  # slots a row gets ahead, at least; a 64th of what rows hold where that is more


def slots_of(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64 `[sum of lengths]`: starts[0], starts[0] + 1, ..., then those of the next row."""
    ends = lengths.cumsum(0)
    first = (starts - ends + lengths).repeat_interleave(lengths)
    return first + torch.arange(len(first))


def starts_of(sizes: Tensor) -> Tensor:
    """int64 `[R]`: where rows begin that have room for `sizes`."""
    return sizes.cumsum(0) - sizes


def fits(starts: Tensor, lengths: Tensor, size: int) -> bool:
    """Whether there is room for rows of `lengths` that begin at `starts`, `size` slots in all."""
    ends = torch.cat([starts[1:], torch.tensor([size])])
    return bool((starts + lengths <= ends).all())


def moved(held: Tensor, slots: Tensor, place: Tensor, size: int) -> Tensor:
    """`[size, *rest]`: what `held` `[S, *rest]` has at int64 `slots` `[N]`, at `place` `[N]`."""
    found = zeros((size, *held.shape[1:]), held.dtype, held.device)
    found.index_copy_(0, place.to(held.device), held.index_select(0, slots.to(held.device)))
    return found


def marked_of(marked: Tensor, lengths: Tensor) -> Tensor:
    """int64 `[R]` on the CPU: how many of each row's tokens are marked in bool `[N]`."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return row[marked.cpu()].bincount(minlength=len(lengths))


def spare(lengths: Tensor) -> int:
    """Slots that rows get ahead when they grow, having held so many; none for the first tokens."""
    mean = int(lengths.sum()) // max(1, len(lengths))
    return max(SPARE, mean // 64) if mean else 0
