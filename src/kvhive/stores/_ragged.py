"""Ragged store: heads that hold different numbers of tokens, in memory for just those.

No form of its own in a recipe: a dense store becomes ragged as soon as an eviction leaves heads
that differ (`Plan.uneven`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import Ask, Observed, Rows, attend, report
from kvhive.kernels.dispatch import attend_ragged, serves_ragged
from kvhive.kernels.ragged import Extents, Seen
from kvhive.memory import zeros
from kvhive.plan import Plan
from kvhive.stores._layout import Block, Layout
from kvhive.stores._merging import fold
from kvhive.stores.base import Store

REUSED = 32  # memory is used again if less than 1 / REUSED of it is left over


class RaggedStore(Store):
    """Keys `[slots, d]` and values `[slots, e]` of all rows (batch row, KV head), one after
    another; `Layout` says where each begins, how long it is and what room it has.

    The bytes are the sum of what the heads hold, and a few percent of headroom. Decoding writes in
    place. Attention reads no slot of another row: it goes block by block, a block being rows of
    nearly equal length.
    """

    def __init__(
        self, batch: int, heads: int, keys: Tensor, values: Tensor, layout: Layout
    ) -> None:
        self.batch, self.heads = batch, heads
        self._take_over(keys, values, layout)

    @classmethod
    def gathered(
        cls, keys: Tensor, values: Tensor, places: Tensor, counts: Tensor, spare: int
    ) -> RaggedStore:
        """The slots of flat keys `[n, d]` and values `[n, e]` at int64 `places` `[b, K, longest]`,
        right-aligned: of each row the last `counts` (int64 `[b, K]` on the CPU) are its tokens.
        spare: slots each row can grow by.
        """
        batch, heads, longest = places.shape
        layout = Layout.of(counts.flatten(), longest, spare, keys.device)
        rows = places.view(-1, longest).clamp(0, len(keys) - 1)
        keys, values = (_laid_out(held, rows, layout, None) for held in (keys, values))
        return cls(batch, heads, keys, values, layout)

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self._layout.length + self._layout.spare

    @property
    def knows_empty(self) -> bool:
        """Each row has its own length."""
        return True

    @property
    def mean(self) -> int:
        """Slots that a row holds, on average, rounded up."""
        grown = self.length - self._layout.length
        return -(-int(self._layout.counts.sum()) // len(self._layout.counts)) + grown

    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens to every row, with room for `room` slots."""
        fresh = keys.shape[2]
        if self.length + fresh > self.room:
            self._lay_out(self._places(), self._counts(), room - self.length)
        place = self._layout.shift
        if fresh > 1:
            place = (place[:, None] + torch.arange(fresh, device=place.device)).flatten()
        place = place + self.length
        for held, new in ((self._keys, keys), (self._values, values)):
            held.index_copy_(0, place, new.to(held.dtype).reshape(len(place), held.shape[1]))
        self.length += fresh

    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """Block by block, each with the kernel that suits the step; on a GPU all at once."""
        if serves_ragged(query, self._keys, self._values, ask):
            extents = self._extents()
            out, seen = attend_ragged(query, self._keys, self._values, extents, ask)
            return out, self._spread(query, ask, seen, extents)
        parts = [
            attend(rows, keys, values, part) for rows, keys, values, part in self._split(query, ask)
        ]
        out = self._layout.restored(torch.cat([out for out, _ in parts]))
        out = out.reshape(*query.shape[:3], -1)
        return out, self._joined(query, ask, [seen for _, seen in parts])

    def report(self, query: Tensor, ask: Ask) -> Observed:
        """What `attend` would report."""
        parts = [report(rows, keys, part) for rows, keys, _, part in self._split(query, ask)]
        return self._joined(query, ask, parts)

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, padded with zeros to the longest; copies."""
        return self._padded_slots(1), self._padded_slots(2)

    def compact(self, plan: Plan, room: int) -> RaggedStore:
        """Fold by plain means, then gather."""
        if plan.into is not None:
            keys, values = (fold(held, plan.into).flatten(0, 2) for held in self.view())
            places = plan.rows(self.length).view_as(plan.index)
            return self.gathered(keys, values, places, plan.tally, room - plan.longest)
        index = plan.index.flatten(0, 1)
        self._lay_out(index + self._layout.shift[:, None], plan.tally, room - plan.longest)
        return self

    def resize(self, room: int) -> None:
        """Hold the same in room for `room` slots, no fewer than there are."""
        self._lay_out(self._places(), self._counts(), room - self.length)

    def take_keys(self, slots: Tensor) -> Tensor:
        """Keys `[N, d]` of the slots marked."""
        return self._keys.index_select(0, self._marked(slots))

    def put_keys(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of the slots marked."""
        self._keys.index_copy_(0, self._marked(slots), keys)

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        places = self._places().view(self.batch, self.heads, -1).index_select(0, rows)
        counts = self._counts().view(self.batch, self.heads).index_select(0, rows.cpu())
        self.batch = len(rows)
        self._lay_out(places.flatten(0, 1), counts, self.room - self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, offsets and spare room included."""
        held = self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()
        return held + self._layout.nbytes

    # ---- blocks ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": None}  # views, which a copy must have of its own memory

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        length = self.length
        self._take_over(self._keys, self._values, self._layout)
        self.length = length

    def _take_over(self, keys: Tensor, values: Tensor, layout: Layout) -> None:
        self._keys, self._values, self._layout = keys, values, layout
        self._blocks = [(block, block.view(keys), block.view(values)) for block in layout.blocks]
        self.length = layout.length

    def _used(self, block: Block) -> int:
        return block.most + self.length - self._layout.length

    def _split(self, query: Tensor, ask: Ask) -> list[tuple[Tensor, Tensor, Tensor, Ask]]:
        """For every block its queries `[rows, H / K, q, d]`, keys `[rows, 1, used, d]`, values, and
        what is asked of it.
        """
        layout, size = self._layout, (self.batch * self.heads, -1, *query.shape[2:])
        queries = layout.ordered(query.reshape(size))
        valid = None if ask.valid is None else layout.ordered(ask.valid.flatten(0, 1))
        real = ask.step.real
        if real is not None:
            real = layout.ordered(real.repeat_interleave(self.heads, 0))
        parts = []
        for block, keys, values in self._blocks:
            mine, used, part = slice(block.first, block.stop), self._used(block), ask
            seen = block.valid(used) if valid is None else valid[mine, None, self.length - used :]
            if real is not None:
                part = replace(ask, step=replace(ask.step, real=real[mine]))
            if seen is not None:
                part = replace(part, valid=seen)
            keys, values = keys.narrow(2, 0, used), values.narrow(2, 0, used)
            parts.append((queries[mine], keys, values, part))
        return parts

    def _joined(self, query: Tensor, ask: Ask, parts: list[Observed]) -> Observed:
        """What all blocks report, as of heads padded to the longest."""
        needs, columns, rows = ask.needs, None, None
        if needs.columns is not None:
            columns = self._padded([seen.columns for seen in parts if seen.columns is not None])
            columns = columns.reshape(self.batch, -1, self.length)
        reported = [seen.rows for seen in parts if seen.rows is not None]
        if reported:
            first = reported[0]

            def block(start: int, stop: int) -> Tensor:
                joined = self._padded([one.block(start, stop) for one in reported])
                return joined.reshape(self.batch, -1, stop - start, joined.shape[-1])

            rows = Rows(first.count, block, first.size)
        sums = [seen.lse for seen in parts if seen.lse is not None]
        return Observed(
            fresh=query.shape[2],
            columns=columns,
            rows=rows,
            queries=query if needs.queries else None,
            keys=self.view()[0] if needs.keys else None,
            scale=ask.scale,
            lse=self._layout.restored(torch.cat(sums)).reshape(query.shape[:3]) if sums else None,
        )

    def _padded_slots(self, part: Literal[1, 2]) -> Tensor:
        """Keys (1) or values (2) `[b, K, length, d]`, zeros in front."""
        held = [found[part].narrow(2, 0, self._used(found[0])) for found in self._blocks]
        wide = [F.pad(one, (0, 0, self.length - one.shape[2], 0)) for one in held]
        for block, one in zip(self._layout.blocks, wide, strict=True):
            if (valid := block.valid(self._used(block))) is not None:
                empty = ~valid[..., None]
                one[:, :, self.length - empty.shape[2] :].masked_fill_(empty, 0)
        rows = self._layout.restored(torch.cat(wide))
        return rows.view(self.batch, self.heads, self.length, rows.shape[3])

    def _padded(self, parts: list[Tensor]) -> Tensor:
        """`[rows of a block, ..., used]` of each block as `[rows, ..., length]`, zeros in front."""
        wide = [F.pad(part, (self.length - part.shape[-1], 0)) for part in parts]
        return self._layout.restored(torch.cat(wide))

    # ---- all at once ----------------------------------------------------------------------------

    def _extents(self) -> Extents:
        """Where each row lies now."""
        layout, grown = self._layout, self.length - self._layout.length
        lengths = layout.shift + self.length - layout.starts
        return Extents(layout.starts, lengths, int(layout.counts.max()) + grown)

    def _spread(self, query: Tensor, ask: Ask, seen: Seen, extents: Extents) -> Observed:
        """What is said of flat slots, as of heads padded to the longest."""
        slot = torch.arange(self.length, device=self._keys.device)
        held = slot >= (self.length - extents.lengths)[:, None]
        places = self._places().clamp(0, len(self._keys) - 1)

        def padded(flat: Tensor) -> Tensor:
            return flat[..., places] * held  # [..., rows, length]

        columns, rows, needs = seen.columns, seen.rows, ask.needs
        if columns is not None:
            each = padded(columns) if needs.fold else padded(columns).transpose(0, 1)
            columns = each.reshape(self.batch, -1, self.length)
        if rows is not None:
            each = padded(rows).permute(2, 0, 1, 3)
            rows = each.reshape(self.batch, -1, rows.shape[1], self.length)
        return Observed(
            fresh=query.shape[2],
            columns=columns,
            rows=None if rows is None else Rows.of(rows),
            queries=query if needs.queries else None,
            keys=self.view()[0] if needs.keys else None,
            scale=ask.scale,
        )

    # ---- places ---------------------------------------------------------------------------------

    def _places(self) -> Tensor:
        """int64 `[rows, length]`: where each slot lies; what is empty lies anywhere."""
        shift = self._layout.shift
        return shift[:, None] + torch.arange(self.length, device=shift.device)

    def _counts(self) -> Tensor:
        """int64 `[rows]` on the CPU: slots of each row."""
        return self._layout.counts + (self.length - self._layout.length)

    def _marked(self, slots: Tensor) -> Tensor:
        """int64 `[N]`: where the slots marked in bool `[b, K, length]` lie."""
        row, slot = slots.flatten(0, 1).nonzero(as_tuple=True)
        return self._layout.shift[row] + slot

    def _lay_out(self, places: Tensor, counts: Tensor, spare: int) -> None:
        """Keep the slots at int64 `places` `[rows, longest]`, right-aligned, `counts` of each."""
        layout = self._layout
        if not layout.fits(counts.flatten(), places.shape[1], spare):
            layout = Layout.of(counts.flatten(), places.shape[1], spare, self._keys.device)
        rows = places.clamp(0, len(self._keys) - 1)
        self._take_over(
            _laid_out(self._keys, rows, layout, self._keys),
            _laid_out(self._values, rows, layout, self._values),
            layout,
        )


def _laid_out(held: Tensor, places: Tensor, layout: Layout, memory: Tensor | None) -> Tensor:
    """Slots of `[n, d]` at int64 `places` `[rows, longest]` as the layout wants them, `[slots, d]`.

    memory: of before, to be written to where it is not much too large.
    """
    ordered, longest = layout.ordered(places), places.shape[1]
    parts = [
        ordered[block.first : block.stop, longest - block.most :].flatten()
        for block in layout.blocks
    ]
    taken = held.index_select(0, torch.cat(parts))
    fits = memory is not None and 0 <= len(memory) - layout.slots <= layout.slots // REUSED
    if memory is None or not fits:
        memory = zeros((layout.slots, held.shape[1]), held.dtype, held.device)
    sizes = [block.rows * block.most for block in layout.blocks]
    for block, part in zip(layout.blocks, taken.split(sizes), strict=True):
        mine = part.view(block.rows, 1, block.most, held.shape[1])
        block.view(memory).narrow(2, 0, block.most).copy_(mine)
    return memory
