"""Rows of exact numbers: a part of a packed store that rounds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvhive.stores._flat import fits, marked_of, moved, slots_of, spare, starts_of
from kvhive.stores._part import Form, Part


@dataclass(eq=False)
class Whole(Part):
    """Tokens as they are, in one flat array without padding between rows.

    numbers: `[S, d]` in the model's dtype. starts, held: int64 `[R]` on the CPU, slot of a row's
    first token and its tokens. Slots that no row holds are room to grow.
    """

    numbers: Tensor
    starts: Tensor
    held: Tensor

    @property
    def lengths(self) -> Tensor:
        """See the base."""
        return self.held

    def row(self, row: int, first: int, last: int) -> Tensor:
        """See the base."""
        start = int(self.starts[row])
        return self.numbers[start + first : start + last].float()

    @cached_property
    def _block(self) -> Tensor | None:
        """`[R, n, d]`, a view, where all rows hold n tokens and lie at equal distance."""
        rows, length = len(self.held), int(self.held[0]) if len(self.held) else 0
        room = len(self.numbers) // rows if rows else 0
        even = torch.equal(self.starts, torch.arange(rows) * room)
        if not rows or room * rows != len(self.numbers) or not even:
            return None
        if not bool((self.held == length).all()):
            return None
        return self.numbers.view(rows, room, self.numbers.shape[1])[:, :length]

    def logits(self, query: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base."""
        first = int(at[0])
        if self._block is not None and bool((at == first).all()):
            last = first + self._block.shape[1]
            out[..., first:last] = query @ self._block.float().transpose(1, 2)
            return
        for row, (place, length) in enumerate(zip(at.tolist(), self.held.tolist(), strict=True)):
            out[row, :, place : place + length] = query[row] @ self.row(row, 0, length).T

    def mix(self, weights: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base."""
        first = int(at[0])
        if self._block is not None and bool((at == first).all()):
            last = first + self._block.shape[1]
            out += weights[..., first:last] @ self._block.float()
            return
        for row, (place, length) in enumerate(zip(at.tolist(), self.held.tolist(), strict=True)):
            out[row] += weights[row, :, place : place + length] @ self.row(row, 0, length)

    def joined(self, tokens: Tensor, lengths: Tensor) -> Whole:
        """See the base."""
        numbers, starts, held = self.numbers, self.starts, self.held + lengths
        if not fits(starts, held, len(numbers)):
            sizes = held + spare(self.held)
            starts = starts_of(sizes)
            old, new = slots_of(self.starts, self.held), slots_of(starts, self.held)
            numbers = moved(numbers, old, new, int(sizes.sum()))
        place = slots_of(starts + self.held, lengths).to(numbers.device)
        numbers.index_copy_(0, place, tokens.to(numbers.dtype))
        return Whole(numbers, starts, held)

    def replaced(self, which: Tensor, tokens: Tensor) -> None:
        """See the base."""
        slots = slots_of(self.starts, self.held).to(which.device)[which]
        self.numbers.index_copy_(0, slots, tokens.to(self.numbers.dtype))

    def kept(self, keep: Tensor) -> Whole:
        """See the base."""
        slots = slots_of(self.starts, self.held)[keep.cpu()]
        return self._taken(slots, marked_of(keep, self.held))

    def selected(self, which: Tensor) -> Whole:
        """See the base."""
        held = self.held[which]
        return self._taken(slots_of(self.starts[which], held), held)

    def _taken(self, slots: Tensor, held: Tensor) -> Whole:
        starts = starts_of(held)
        place, size = slots_of(starts, held), int(held.sum())
        return Whole(moved(self.numbers, slots, place, size), starts, held)

    @property
    def nbytes(self) -> int:
        """See the base."""
        tensors = self.numbers, self.starts, self.held
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True)
class Exactly(Form):
    """Tokens as they are."""

    def part(self, tokens: Tensor, lengths: Tensor) -> Whole:
        """See the base."""
        return Whole(tokens.clone(), starts_of(lengths), lengths)
