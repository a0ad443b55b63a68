"""Slots: the bookkeeping of one layer's cache, one entry for every token a KV head holds.

A slot knows its token's position and whatever columns the policy declared; keys and values lie in
the store, under the same index. Slots are ascending by position and right-aligned: heads and rows
that hold fewer tokens than the fullest one begin with empty slots (position -1), as left padding
does; padding that comes after tokens lies between them until the next prompt or eviction. New
tokens are appended at the end, so the last slots are always the most recent tokens.

Nothing here asks the device for a number but `recount` and `truncate` in a padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.memory import take, widen
from kvhive.plan import Plan
from kvhive.step import Step

EMPTY = -1
WASTED = 32  # empty slots are not held where they take more than 1 / WASTED of the keys' bytes
SHORT_MAX = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Column:
    """A per-slot quantity of a policy that must travel with the slot: dtype and trailing shape."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


class Slots:
    """Positions, and a policy's columns and counters, of `[batch, kv_heads, length]` slots.

    columns: per-slot tensors `[b, K, n, *shape]`, zero when a slot is new; counters: one number per
    head, `[b, K]`; state: what a policy knows of a row as a whole, tensors `[b, ...]` that it puts
    there itself; notes: numbers of its that are the same for all rows, known to the CPU.
    Positions count the real tokens of a row, padding excluded, from 0; they are held in 2 bytes
    until a row has seen 32,767 tokens, then in 4. Where all rows agree, those of tokens decoded
    since the last look are consecutive and not written down before somebody asks. Where heads
    differ much, what is held between two steps is `pack`ed, without the empty slots.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        columns: Mapping[str, Column],
        counters: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self.batch, self.heads = batch, heads
        self.length = 0
        self.holes = False  # whether any of the slots in use may be empty
        self.gaps = False  # whether empty slots may lie behind tokens, instead of in front
        self.last: int | None = None  # position of the last token seen, where all rows agree
        self.before_reading: Callable[[], None] | None = None  # called before a column is looked at
        self._room = 0  # slots to make room for
        self._written = 0  # leading slots whose position is written down
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
        self.notes: dict[str, int] = {}
        self._tally = torch.zeros(batch, heads, dtype=torch.int64)
        self._grown = 0  # tokens of every head that `_tally` does not count yet
        self._empty = 0  # slots that were empty after the last eviction
        self._packed: Tensor | None = None  # int64 [b, K] on the CPU, slots that are packed

    @property
    def room(self) -> int:
        """Slots there is room for, or will be when something is written down."""
        return self._room

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self._position.device

    @property
    def position(self) -> Tensor:
        """int32 `[b, K, n]`: each slot's position in its row, -1 for an empty slot."""
        self._write_positions()
        return self._position[:, :, : self.length].to(torch.int32)

    def newest(self, number: int) -> Tensor:
        """int64 `[b, number]`: positions of the last slots, which a step brought last and which
        are the same in all heads; -1 for padding.
        """
        self._write_positions()
        return self._position[:, 0, self.length - number : self.length].long()

    @property
    def valid(self) -> Tensor:
        """bool `[b, K, n]`: whether the slot holds a token."""
        if not self.holes:
            shape = (self.batch, self.heads, self.length)
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        self._write_positions()
        return self._position[:, :, : self.length] >= 0

    @property
    def count(self) -> Tensor:
        """int64 `[b, K]`: tokens held."""
        if self.gaps:
            return self.valid.sum(-1)
        if self.holes:
            return self.tally.to(self.device)
        size = (self.batch, self.heads)
        return torch.full(size, self.length, dtype=torch.int64, device=self.device)

    @property
    def rank(self) -> Tensor:
        """int64 `[b, K, n]`: a token's place among the tokens its head holds, oldest 0; empty slots
        < 0.
        """
        if self.holes:
            valid = self.valid
            return valid.cumsum(-1).masked_fill(~valid, 0) - 1
        place = torch.arange(self.length, device=self.device)
        return place.expand(self.batch, self.heads, -1)

    @property
    def tally(self) -> Tensor:
        """int64 `[b, K]` on the CPU: tokens held, or more where padding may have been decoded."""
        if self._grown:
            self._tally = self._tally + self._grown
            self._grown = 0
        return self._tally

    def recount(self) -> None:
        """Ask the device, so that `tally` is exact."""
        self._tally, self._grown = self.valid.sum(-1).cpu(), 0

    def __getitem__(self, column: str) -> Tensor:
        """The column's slots in use, a view `[b, K, n, *shape]` that may be written in place."""
        if self.before_reading is not None:
            self.before_reading()
        self._unpack()
        return self._columns[column][:, :, : self.length]

    def reshape(self, column: str, shape: tuple[int, ...]) -> None:
        """Give a column another trailing shape, all zeros, known from the first step only."""
        self._unpack()
        held = self._columns[column]
        if held.shape[3:] != shape:
            self._columns[column] = held.new_zeros(*held.shape[:3], *shape)

    def append(self, step: Step, room: int) -> None:
        """Add the step's slots at the end; their columns are zero. room: slots to make room for."""
        first, plain = self.length, isinstance(step.position, int)
        if not plain:
            self._write_positions()
        self.length = first + step.fresh
        self._room = max(room, self.length)
        self.last = step.last if plain else None
        if not plain:
            self._append_rows(step, first)
        if isinstance(step.brings, int):
            self._grown += step.brings
        else:
            self._tally = self.tally + step.brings[:, None]
        if self._packed is None:
            for name, column in self._columns.items():
                if column.shape[2] < self.length:
                    self._columns[name] = widen(column, first, self._room)

    def adopt(self, plan: Plan) -> None:
        """Take over what an eviction changes of the policy's knowledge."""
        for name, column in plan.columns.items():
            self[name].copy_(column)
        for name, counter in plan.counters.items():
            self.counters[name].copy_(counter)

    def compact(self, plan: Plan, room: int) -> None:
        """Keep the slots that the plan names, drop all others."""
        self._write_positions()
        position = self._take(self._position, plan, room)
        if (empty := plan.empty) is not None:
            position[:, :, : plan.longest].masked_fill_(empty, EMPTY)
        self._position = position
        self._columns = {
            name: self._take(column, plan, room) for name, column in self._columns.items()
        }
        self.length = self._written = plan.longest
        self._room, self.holes, self.gaps = room, plan.holes, False
        self._tally, self._grown = plan.tally, 0
        self._empty = self.length * plan.tally.numel() - int(plan.tally.sum()) if plan.holes else 0

    def resize(self, room: int) -> None:
        """Hold the same in room for `room` slots, no fewer than there are."""
        self._write_positions()
        self._room = room
        self._position = widen(self._position, self.length, room)
        self._columns = {k: widen(v, self.length, room) for k, v in self._columns.items()}

    def pack(self, worth: int) -> None:
        """Hold no empty slots until somebody looks, if they take much beside `worth` bytes.

        Padding may not lie behind tokens. Asks no device.
        """
        if self._packed is not None or self.gaps or not self._empty:
            return
        columns = self._columns.values()
        size = self._position.itemsize
        size += sum(column.itemsize * math.prod(column.shape[3:]) for column in columns)
        if self._empty * size * WASTED < worth:
            return
        self._write_positions()
        counts = self.tally.flatten()
        self._packed = self.tally.clone()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        slot = torch.arange(len(rows)) - (counts.cumsum(0) - self.length)[rows]
        place = rows.to(self.device), slot.to(self.device)
        self._position = self._position.flatten(0, 1)[place]
        self._columns = {name: c.flatten(0, 1)[place] for name, c in self._columns.items()}

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`, which leave no trace."""
        dropped = self.length - length
        self._unpack()
        if self.holes and dropped:
            self._write_positions()
            newest = self._position[:, :, length : self.length] >= 0
            self._tally = self.tally - newest.sum(-1).cpu()
        else:
            self._grown -= dropped
        if self.last is not None:
            self.last -= dropped
        for column in self._columns.values():
            column[:, :, length : self.length] = 0
        self.length = length
        self._written = min(self._written, length)

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        self._unpack()
        self.batch = len(rows)
        self._position = self._position.index_select(0, rows)
        self._columns = {k: v.index_select(0, rows) for k, v in self._columns.items()}
        self.counters = {k: v.index_select(0, rows) for k, v in self.counters.items()}
        self.state = {k: v.index_select(0, rows) for k, v in self.state.items()}
        self._tally = self._tally.index_select(0, rows.cpu())

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, spare room included."""
        held = [self._position, *self._columns.values(), *self.counters.values()]
        held += [*self.state.values(), self._tally]
        held += [] if self._packed is None else [self._packed]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    @staticmethod
    def _take(tensor: Tensor, plan: Plan, room: int) -> Tensor:
        return take(tensor, plan.rows(tensor.shape[2]), plan.longest, room)

    def _append_rows(self, step: Step, first: int) -> None:
        """Write down the positions of a step in which rows differ."""
        assert isinstance(step.position, Tensor)
        self._make_room(first, step.last)
        self._position[:, :, first : self.length] = step.position[:, None, :]
        self._written = self.length
        if step.real is not None:
            self.holes, self.gaps = True, self.gaps or first > 0

    def _write_positions(self) -> None:
        """Write down the positions of tokens that came one after another, alike in all rows."""
        self._unpack()
        first = self._written
        if first == self.length or self.last is None:
            return
        self._make_room(first, self.last)
        stop = self.last + 1
        new = torch.arange(stop - (self.length - first), stop, device=self.device)
        self._position[:, :, first : self.length] = new
        self._written = self.length

    def _unpack(self) -> None:
        """Every head as long as the longest again, empty slots in front."""
        if self._packed is None:
            return
        counts, self._packed = self._packed.to(self.device), None
        slot = torch.arange(self._written, device=self.device)
        held = slot >= self._written - counts[..., None]
        self._position = self._spread(self._position, held, EMPTY)
        self._columns = {name: self._spread(c, held, 0) for name, c in self._columns.items()}

    def _spread(self, packed: Tensor, held: Tensor, empty: int) -> Tensor:
        """`[tokens, *shape]` -> `[b, K, room, *shape]`, at the slots `held`, bool `[b, K, n]`."""
        room, shape = max(self._room, self.length), packed.shape[1:]
        wide = packed.new_full((self.batch, self.heads, room, *shape), empty)
        slots = wide[:, :, : held.shape[2]]
        slots.masked_scatter_(held.view(*held.shape, *[1] * len(shape)), packed)
        return wide

    def _make_room(self, used: int, highest: int) -> None:
        """Room for all slots beside the `used` ones, and for positions up to `highest`."""
        if highest > SHORT_MAX and self._position.dtype == torch.int16:
            self._position = self._position.to(torch.int32)
        if self._position.shape[2] < self.length:
            self._position = widen(self._position, used, self._room)
