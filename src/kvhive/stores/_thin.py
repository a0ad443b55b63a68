"""Thin rows: of every token the channels alone that its row holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.stores._part import Form, Part


@dataclass(eq=False)
class Thin(Part):
    """Tokens of width d of which a part of width w is held, in a form of its own; channels that are
    not held are zero.

    channels: int16 `[R, w]`, those that each row holds, ascending.
    """

    held: Part
    channels: Tensor
    width: int

    @property
    def lengths(self) -> Tensor:
        """See the base."""
        return self.held.lengths

    def row(self, row: int, first: int, last: int) -> Tensor:
        """See the base."""
        numbers = self.held.row(row, first, last)
        wide = numbers.new_zeros(len(numbers), self.width)
        wide[:, self.channels[row].long()] = numbers
        return wide

    def logits(self, query: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base; the query is thinned, the tokens are read as they lie."""
        self.held.logits(torch.take_along_dim(query, self._index, 2), out, at)

    def mix(self, weights: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base."""
        mixed = out.new_zeros(*out.shape[:2], self.channels.shape[1])
        self.held.mix(weights, mixed, at)
        out.scatter_add_(2, self._index.expand_as(mixed), mixed)

    def joined(self, tokens: Tensor, lengths: Tensor) -> Thin:
        """See the base."""
        return Thin(self.held.joined(self._thinned(tokens, lengths), lengths), *self._own)

    def replaced(self, which: Tensor, tokens: Tensor) -> None:
        """See the base."""
        row = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        lengths = row[which.cpu()].bincount(minlength=len(self.lengths))
        self.held.replaced(which, self._thinned(tokens, lengths))

    def kept(self, keep: Tensor) -> Thin:
        """See the base."""
        return Thin(self.held.kept(keep), *self._own)

    def selected(self, which: Tensor) -> Thin:
        """See the base."""
        channels = self.channels[which.to(self.channels.device)]
        return Thin(self.held.selected(which), channels, self.width)

    @property
    def nbytes(self) -> int:
        """See the base."""
        return self.held.nbytes + self.channels.untyped_storage().nbytes()

    @property
    def _own(self) -> tuple[Tensor, int]:
        return self.channels, self.width

    @property
    def _index(self) -> Tensor:
        """int64 `[R, 1, w]`."""
        return self.channels.long()[:, None]

    def _thinned(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return thinned(tokens, self.channels, lengths)


@dataclass(frozen=True, eq=False)
class Thinned(Form):
    """What is left of tokens in a form of its own. channels: as in `Thin`; width: d."""

    form: Form
    channels: Tensor
    width: int

    def part(self, tokens: Tensor, lengths: Tensor) -> Thin:
        """See the base."""
        held = self.form.part(thinned(tokens, self.channels, lengths), lengths)
        return Thin(held, self.channels, self.width)


def thinned(tokens: Tensor, channels: Tensor, lengths: Tensor) -> Tensor:
    """`[N, w]` of tokens `[N, d]`, `lengths` of each row (int64 `[R]` on the CPU): the channels of
    its row, int16 `[R, w]`.
    """
    each = channels.long().repeat_interleave(lengths.to(channels.device), 0)
    return tokens.gather(1, each)
