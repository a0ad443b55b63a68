"""Where the tokens of a packed store stand: slots, as policies see them, and columns, as attention
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import Ask
from kvhive.stores._side import Side
from kvhive.stores.base import Store


class Columned(Store):
    """Keys and values of rows (batch row, KV head), each a `Side`, whose tokens have columns.

    _whole: nothing was packed or dropped yet, and all is exact. _level: every slot is the column of
    the same number. _tiers: uint8 `[R, n]`, the tier of packed tokens, right-aligned; None: of one.
    """

    batch: int
    heads: int
    _keys: Side
    _values: Side
    _whole: bool
    _level: bool
    _tiers: Tensor | None

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self._keys, self._values

    def _exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[b, K, n, d]` while all are exact."""
        size = self.batch, self.heads
        keys, values = (side.exact.tokens.unflatten(0, size) for side in self._sides)
        return keys, values

    def _packed_counts(self) -> Tensor:
        """int64 `[R]` on the CPU: packed keys of each row."""
        lengths = torch.zeros(self.batch * self.heads, dtype=torch.int64)
        for part in self._keys.parts:
            lengths = lengths + part.lengths
        return lengths

    def _counts(self) -> Tensor:
        """int64 `[R]` on the CPU: tokens of each row."""
        return self._keys.sink_counts + self._keys.lengths

    def _look(self) -> None:
        """Find out whether slots are columns: every row holds as many, in one part at most."""
        side, level = self._keys, self._keys.exact.missing is None and len(self._keys.parts) < 2
        if level and side.parts:
            level = bool((side.parts[0].lengths == side.parts[0].longest).all())
        self._level = level and side.width == self.length

    def _column(self) -> tuple[Tensor, Tensor]:
        """int64 `[R, length]`, the column of each slot, and bool, as large: whether it holds a
        token; what an empty slot's column is means nothing.
        """
        side, device = self._keys, self._keys.exact.tokens.device
        counts, sinks = (
            self._counts().to(device)[:, None],
            self._keys.sink_counts.to(device)[:, None],
        )
        slot = torch.arange(self.length, device=device)
        place = slot - (self.length - counts)  # among the tokens of the row
        column = side.width - self.length + slot + torch.zeros_like(place)
        if self._tiers is not None:
            packed = self._packed_counts().to(device)[:, None]
            inside = (place >= sinks) & (place < sinks + packed)
            size = self._tiers.shape[1]
            label = (place - sinks + size - packed).clamp(0, max(size - 1, 0))
            tier = self._tiers.gather(1, label) if size else torch.zeros_like(label)
            for number, start in enumerate(side.places()):
                own = inside & (tier == number)
                column = torch.where(own, start.to(device)[:, None] + own.cumsum(1) - 1, column)
        column = torch.where(place < sinks, side.exact.sinks - sinks + place, column)
        return column.clamp(0, max(side.width - 1, 0)), place >= 0

    def _seen(self, ask: Ask) -> Tensor | None:
        """bool `[R, width]`: columns that hold a token, of those that `ask.valid` leaves; None: all
        do.
        """
        if self._level:
            return None if ask.valid is None else ask.valid.flatten(0, 1)
        marked = torch.ones(self.batch * self.heads, self.length, dtype=torch.bool)
        marked = marked.to(self._keys.exact.tokens.device)
        return self._marked(marked if ask.valid is None else ask.valid.flatten(0, 1))

    def _marked(self, slots: Tensor) -> Tensor:
        """bool `[R, width]`: the columns of the slots marked in bool `[R, length]`."""
        if self._level:
            return slots
        column, held = self._column()
        nowhere = self._keys.width
        marked = slots.new_zeros(len(slots), nowhere + 1)
        marked.scatter_(1, torch.where(held & slots, column, nowhere), torch.ones_like(slots))
        return marked[:, :nowhere]

    def _slots(self, columns: Tensor) -> Tensor:
        """Of `[b, heads, ..., width]`, `[b, heads, ..., length]`: columns as slots, zeros for empty
        ones; heads are KV heads or query heads.
        """
        if self._level:
            return columns
        column, held = self._column()
        size = *columns.shape[:2], *[1] * (columns.dim() - 3), self.length
        each = columns.shape[1] // self.heads
        shape = self.batch, self.heads, self.length
        column, held = (
            one.view(shape).repeat_interleave(each, 1).view(size) for one in (column, held)
        )
        taken: Tensor = torch.take_along_dim(columns, column, -1) * held
        return taken
