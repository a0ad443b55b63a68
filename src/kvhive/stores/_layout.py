"""Where rows of unequal lengths lie in one flat array: one after another, each with its own offset.

A row is one KV head of one row of the batch. Rows of nearly equal length lie side by side with
equal room, as a small dense block `[rows, room]`, right-aligned: few blocks hold any number of
rows, and each is attended in one call. What a block leaves empty is a sixteenth of it at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COARSE = 16  # rows may be shorter than the longest of their block by 1 / COARSE of it


@dataclass(frozen=True, eq=False)
class Block:
    """Rows `first` to `stop - 1`, in the order they lie in, with `room` slots each from `start` on.

    most: slots of its longest row when it was laid out. front: int64 `[rows, 1]`, how many fewer
    each had, which are left empty in front; None: none had fewer.
    """

    first: int
    stop: int
    start: int
    room: int
    most: int
    front: Tensor | None

    @classmethod
    def of(cls, counts: Tensor, first: int, start: int, spare: int, device: torch.device) -> Block:
        """For the rows from `first` on, which hold so many tokens (int64 `[rows]` on the CPU)."""
        most = int(counts.max())
        front = (most - counts[:, None]).to(device) if int(counts.min()) < most else None
        return cls(first, first + len(counts), start, most + spare, most, front)

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.first

    def view(self, flat: Tensor) -> Tensor:
        """Its slots of flat `[slots, d]`, as `[rows, 1, room, d]`."""
        mine = flat.narrow(0, self.start, self.rows * self.room)
        return mine.view(self.rows, 1, self.room, flat.shape[1])

    def valid(self, used: int) -> Tensor | None:
        """bool `[rows, 1, used]`, False for what is empty in front; None: nothing is."""
        if self.front is None:
            return None
        return (torch.arange(used, device=self.front.device) >= self.front)[:, None]


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of a store, and where each row is.

    counts: int64 `[rows]` on the CPU, slots of each row when they were laid out; length: as of
    `Slots` then, no less than the most of them. spare: slots that every row may grow by; slots: of
    the flat array, in all. shift: int64 `[rows]`: slot j of row r, of `length` right-aligned ones,
    lies at shift[r] + j, also after rows have grown. starts: int64 `[rows]`, the first slot of each
    row. order: int64 `[rows]`, which row lies where;
    place: the reverse; both None where rows lie in their own order.
    """

    blocks: tuple[Block, ...]
    counts: Tensor
    length: int
    spare: int
    slots: int
    shift: Tensor
    starts: Tensor
    order: Tensor | None
    place: Tensor | None

    @classmethod
    def of(cls, counts: Tensor, length: int, spare: int, device: torch.device) -> Layout:
        """For rows that hold so many tokens (int64 `[rows]` on the CPU)."""
        sizes, order = counts.sort(descending=True, stable=True)
        ends = _ends_of_blocks(sizes.tolist())
        if len(ends) == len(counts):  # nothing is gained by another order
            sizes, order = counts, torch.arange(len(counts))
        blocks: list[Block] = []
        first = start = 0
        for stop in ends:
            block = Block.of(sizes[first:stop], first, start, spare, device)
            start += block.rows * block.room
            first = stop
            blocks.append(block)
        shift = torch.empty_like(counts)
        shift[order] = torch.cat([_last_slots(block) for block in blocks]) - length
        moved = len(ends) < len(counts) and order.tolist() != list(range(len(order)))
        where = order.to(device) if moved else None
        back = order.argsort().to(device) if moved else None
        starts = (shift + length - counts).to(device)
        return cls(
            blocks=tuple(blocks),
            counts=counts.clone(),
            length=length,
            spare=spare,
            slots=start,
            shift=shift.to(device),
            starts=starts,
            order=where,
            place=back,
        )

    def fits(self, counts: Tensor, length: int, spare: int) -> bool:
        """Whether it is the very layout that `of` would make."""
        return (length, spare) == (
            self.length,
            self.spare,
        ) and counts.tolist() == self.counts.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of what says where rows are."""
        held = [self.counts, self.shift, self.starts, self.order, self.place]
        held += [block.front for block in self.blocks]
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)

    def ordered(self, rows: Tensor) -> Tensor:
        """`[rows, ...]` in the order they lie in."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def restored(self, rows: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return rows if self.place is None else rows.index_select(0, self.place)


def _ends_of_blocks(sizes: list[int]) -> list[int]:
    """Where to cut rows, the longest first, so that those of a block are of nearly equal length."""
    coarse, first, ends = sum(sizes) // (2 * len(sizes)), 0, []
    for stop in range(1, len(sizes)):
        if sizes[first] - sizes[stop] > max(sizes[first], coarse) // COARSE:
            ends.append(stop)
            first = stop
    return [*ends, len(sizes)]


def _last_slots(block: Block) -> Tensor:
    """int64 `[rows]`: where in the flat array the slots in use of each row of a block end."""
    return block.start + block.most + torch.arange(block.rows) * block.room
