"""Slots: the bookkeeping of one layer's cache, one entry for every token a KV head holds.

A slot knows its token's position and whatever columns the policy declared; keys and values lie in
the store, under the same index. Slots are ascending by position and right-aligned: heads and rows
that hold fewer tokens than the fullest one begin with empty slots (position -1), as left padding
does. New tokens are appended at the end, so the last slots are always the most recent tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.memory import zeros

EMPTY = -1
SHORT_MAX = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Column:
    """A per-slot quantity of a policy that must travel with the slot: dtype and trailing shape."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


def take(tensor: Tensor, index: Tensor, capacity: int) -> Tensor:
    """Gather slots: `[b, K, n, *rest]` at index `[b, K, k]` -> `[b, K, capacity, *rest]`.

    Slots k..capacity-1 are zeroed room to grow. Where there were as many slots before, they are
    written in place: fresh pages would cost more than all the copying. Whole rows are copied
    (`index_select` on the flattened tensor), several times faster on CPU than an element-wise
    `gather`.
    """
    batch, heads, n, *rest = tensor.shape
    kept = index.shape[-1]
    base = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * n
    rows = tensor.reshape(batch * heads * n, *rest).index_select(0, (index + base).flatten())
    rows = rows.view(batch, heads, kept, *rest)
    if n != capacity:
        return widen(rows, kept, capacity)
    tensor[:, :, :kept] = rows
    tensor[:, :, kept:] = 0
    return tensor


def widen(tensor: Tensor, used: int, capacity: int) -> Tensor:
    """A copy of the first `used` slots of `[b, K, n, *rest]` with room for `capacity`."""
    batch, heads, _, *rest = tensor.shape
    wide = zeros((batch, heads, capacity, *rest), tensor.dtype, tensor.device)
    wide[:, :, :used] = tensor[:, :, :used]
    return wide


class Slots:
    """Positions, and a policy's columns and counters, of `[batch, kv_heads, length]` slots.

    columns: per-slot tensors `[b, K, n, *shape]`; counters: one number per head, `[b, K]`; state:
    what a policy knows of a row as a whole, tensors `[b, ...]` that it puts there itself.
    Positions count the real tokens of a row, padding excluded, from 0; they are held in 2 bytes
    until a row has seen 32,767 tokens, then in 4.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        columns: Mapping[str, Column],
        counters: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self.heads = heads
        self.length = 0
        self.capacity = 0
        self.holes = False  # whether any of the slots in use may be empty
        self.last: int | None = None  # position of the last token seen, where all rows agree
        self._position = torch.empty(batch, heads, 0, dtype=torch.int16, device=device)
        self._columns = {
            name: torch.empty(batch, heads, 0, *column.shape, dtype=column.dtype, device=device)
            for name, column in columns.items()
        }
        self.counters = {
            name: torch.zeros(batch, heads, dtype=dtype, device=device)
            for name, dtype in counters.items()
        }
        self.state: dict[str, Tensor] = {}

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self._position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self._position.device

    @property
    def position(self) -> Tensor:
        """int32 `[b, K, n]`: each slot's position in its row, -1 for an empty slot."""
        return self._position[:, :, : self.length].to(torch.int32)

    def newest(self, number: int) -> Tensor:
        """int64 `[b, number]`: positions of the last slots, which a step brought last and which
        are the same in all heads; -1 for padding.
        """
        return self._position[:, 0, self.length - number : self.length].long()

    @property
    def valid(self) -> Tensor:
        """bool `[b, K, n]`: whether the slot holds a token."""
        return self._position[:, :, : self.length] >= 0

    @property
    def count(self) -> Tensor:
        """int64 `[b, K]`: tokens held."""
        if self.holes:
            return self.valid.sum(-1)
        size, device = self._position.shape[:2], self._position.device
        return torch.full(size, self.length, dtype=torch.int64, device=device)

    @property
    def rank(self) -> Tensor:
        """int64 `[b, K, n]`: a token's place among the tokens its head holds, oldest 0; empty slots
        < 0.
        """
        if self.holes:
            return self.valid.cumsum(-1).masked_fill(~self.valid, 0) - 1
        place = torch.arange(self.length, device=self._position.device)
        return place.expand(*self._position.shape[:2], -1)

    def __getitem__(self, column: str) -> Tensor:
        """The column's slots in use, a view `[b, K, n, *shape]` that may be written in place."""
        return self._columns[column][:, :, : self.length]

    def reshape(self, column: str, shape: tuple[int, ...]) -> None:
        """Give a column another trailing shape, all zeros, known from the first step only."""
        held = self._columns[column]
        if held.shape[3:] != shape:
            self._columns[column] = held.new_zeros(*held.shape[:3], *shape)

    def append(self, position: Tensor | int, fresh: int, capacity: int) -> None:
        """Add `fresh` slots at the end; their columns start at zero.

        position: int `[b, fresh]`, -1 for padding, or the first position as an int when no row is
        padded. capacity: slots to make room for.
        """
        first, last = self.length, self.length + fresh
        top = position + fresh - 1 if isinstance(position, int) else int(position.max())
        if top > SHORT_MAX and self._position.dtype == torch.int16:
            self._position = self._position.to(torch.int32)
        if capacity != self.capacity:
            self._resize(capacity)
        if isinstance(position, int):
            new = torch.arange(position, position + fresh, device=self._position.device)
            self._position[:, :, first:last] = new
            self.last = top
        else:
            self.last = None
            self._position[:, :, first:last] = position[:, None, :]
            self.holes = self.holes or bool((position < 0).any())
        for column in self._columns.values():
            column[:, :, first:last] = 0
        self.length = last

    def compact(self, index: Tensor, capacity: int, holes: bool) -> None:
        """Keep the slots at `index` int64 `[b, K, k]` (-1: an empty slot), drop all others."""
        source = index.clamp_min(0)
        position = take(self._position, source, capacity)
        if holes:
            position[:, :, : index.shape[-1]].masked_fill_(index < 0, EMPTY)
        self._position = position
        self._columns = {
            name: take(column, source, capacity) for name, column in self._columns.items()
        }
        self.length, self.capacity, self.holes = index.shape[-1], capacity, holes

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""
        if self.last is not None:
            self.last -= self.length - length
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        self._position = self._position.index_select(0, rows)
        self._columns = {k: v.index_select(0, rows) for k, v in self._columns.items()}
        self.counters = {k: v.index_select(0, rows) for k, v in self.counters.items()}
        self.state = {k: v.index_select(0, rows) for k, v in self.state.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, spare room included."""
        held = [self._position, *self._columns.values(), *self.counters.values()]
        held += self.state.values()
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def _resize(self, capacity: int) -> None:
        self._position = widen(self._position, self.length, capacity)
        self._columns = {
            name: widen(column, self.length, capacity) for name, column in self._columns.items()
        }
        self.capacity = capacity


def packed_index(keep: Tensor) -> tuple[Tensor, bool]:
    """Turn a keep mask bool `[b, K, n]` into slot indices int64 `[b, K, k]`, ascending,
    right-aligned.

    k is the largest number kept by any head; heads that keep fewer begin with -1. The second value
    says whether there are any such gaps.
    """
    count = keep.sum(-1)
    width = int(count.max())
    order = keep.to(torch.uint8).sort(dim=-1, stable=True).indices[..., keep.shape[-1] - width :]
    if int(count.min()) == width:
        return order, False
    column = torch.arange(width, device=keep.device)
    return order.masked_fill(column < (width - count)[..., None], -1), True
