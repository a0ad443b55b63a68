"""Random rows in several forms for tests of kernels that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.kernels import Needs, ragged_reference
from kvhive.kernels.bits import grid, packed, rounded
from kvhive.kernels.packed_rows import PackedRows, Runs
from kvhive.kernels.packed_segments import ExactRows, Form, Segment, cut
from kvhive.kernels.ragged import Extents

HEADROOM = 3  # slots behind each row, at most


@dataclass(frozen=True)
class Part:
    """What a part of all rows looks like: bits 0 are exact; group 0 is a grid for each channel of
    runs of any length.
    """

    bits: int
    group: int = 0


EXACT = Part(0)


@dataclass
class Source:
    """Random numbers. Slots of no row hold NaN and random bytes, so that whoever reads one gives
    himself away.
    """

    generator: torch.Generator
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, seed: int, dtype: torch.dtype, device: str) -> Source:
        return cls(torch.Generator().manual_seed(seed), dtype, device)

    def normal(self, *shape: int) -> Tensor:
        """Rounded to the dtype."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def whole(self, least: int, most: int, *shape: int) -> Tensor:
        """int64, both ends included."""
        return torch.randint(least, most + 1, shape, generator=self.generator)

    def starts(self, lengths: Tensor) -> tuple[Tensor, int]:
        """Of rows that lie in any order with headroom, and all slots."""
        rooms = lengths + self.whole(0, HEADROOM, len(lengths))
        order = torch.randperm(len(lengths), generator=self.generator)
        starts = torch.empty_like(lengths)
        starts[order] = rooms[order].cumsum(0) - rooms[order]
        return starts, int(rooms.sum())

    def rows(self, part: Part, lengths: Tensor, width: int) -> Form:
        """Rows of one form."""
        starts, slots = self.starts(lengths)
        numbers = torch.full((slots, width), float("nan"), dtype=self.dtype)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            numbers[start : start + length] = self.normal(length, width)
        if not part.bits:
            return ExactRows(numbers.to(self.device), starts, lengths)
        codes = self.whole(0, 255, slots, width * part.bits // 8).to(torch.uint8)
        make = self._by_token if part.group else self._by_channel
        grids, runs = make(part, numbers, codes, starts, lengths)
        held = codes.to(self.device), grids.to(self.device)
        return PackedRows(part.bits, width, part.group or 1, *held, starts, lengths, runs)

    def _by_token(
        self, part: Part, numbers: Tensor, codes: Tensor, starts: Tensor, lengths: Tensor
    ) -> tuple[Tensor, None]:
        grouped = numbers.unflatten(1, (-1, part.group))
        grids = grid(grouped.amin(2), grouped.amax(2), part.bits, self.dtype)
        scale, zero = grids.repeat_interleave(part.group, 2).unbind(1)
        whole = packed(rounded(numbers, scale, zero, part.bits), part.bits)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            codes[start : start + length] = whole[start : start + length]
        return grids, None

    def _by_channel(
        self, part: Part, numbers: Tensor, codes: Tensor, starts: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Runs]:
        """Runs of 1 to 40 tokens; behind those of each row is room for more, which holds NaN."""
        ends, grids, firsts, counts = [], [], [], []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            firsts.append(len(ends))
            first = 0
            while first < length:
                last = min(length, first + int(self.whole(1, 40)))
                run = numbers[start + first : start + last]
                grids.append(grid(run.amin(0), run.amax(0), part.bits, self.dtype))
                scale, zero = grids[-1]
                new = packed(rounded(run, scale, zero, part.bits), part.bits)
                codes[start + first : start + last] = new
                ends.append(last)
                first = last
            counts.append(len(ends) - firsts[-1])
            spare = int(self.whole(0, 2))
            ends += [-1] * spare
            grids += [torch.full((2, numbers.shape[1]), float("nan"), dtype=self.dtype)] * spare
        empty = torch.empty(0, 2, numbers.shape[1], dtype=self.dtype)
        places = torch.tensor(ends, dtype=torch.int32, device=self.device)
        runs = Runs(places, torch.tensor(firsts), torch.tensor(counts))
        return torch.stack(grids) if grids else empty, runs


@dataclass
class Case:
    """Arguments of `attend` and `report`, and the tokens of each row, `[n, d]` and `[n, e]`."""

    query: Tensor
    segments: list[Segment]
    keys: list[Tensor]
    values: list[Tensor]
    at: Tensor
    scale: float
    needs: Needs

    @property
    def length(self) -> int:
        """Places up to the end of the last row."""
        return max(int(at) + len(key) for at, key in zip(self.at, self.keys, strict=True))

    def expected(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Output, log-sum-exp, columns and rows of the obvious kernel over tokens that torch
        unpacked.
        """
        lengths = torch.tensor([len(key) for key in self.keys])
        starts = torch.arange(len(lengths)) * self.length
        flat = []
        for rows in (self.keys, self.values):
            held = torch.zeros(len(rows), self.length, rows[0].shape[1], dtype=torch.float64)
            for row, at, tokens in zip(held, self.at, rows, strict=True):
                row[int(at) : int(at) + len(tokens)] = tokens
            flat.append(held.flatten(0, 1))
        extents = Extents(starts + self.at, lengths, self.length)
        query = self.query.double().cpu()
        out, lse = ragged_reference.attend(query, *flat, extents, self.scale)
        seen = ragged_reference.report(query, flat[0], extents, lse, self.scale, self.needs)
        return out, lse, self._padded(seen.columns), self._padded(seen.rows)

    def _padded(self, flat: Tensor | None) -> Tensor | None:
        """Columns `[R * n]` or `[group, R * n]`, or rows `[group, r, R * n]`, as of `Observed`."""
        if flat is None:
            return None
        rows = flat.unflatten(-1, (-1, self.length)).movedim(-2, 0)
        inner = rows.shape[2:] if rows.ndim == 4 else rows.shape[-1:]
        return rows.reshape(len(self.query), -1, *inner)


def case(
    key_parts: Sequence[tuple[Part, Sequence[int]]],
    value_parts: Sequence[tuple[Part, Sequence[int]]] | None = None,
    group: int = 4,
    widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    q: int = 1,
    seed: int = 0,
    needs: Needs = Needs(columns="sum"),  # noqa: B008
    batch: int = 1,
    aligned: bool = False,
    device: str = "cpu",
) -> Case:
    """Rows whose keys, and values, lie in parts with so many tokens of each row; values as keys
    where nothing is said. aligned: whether rows end, not begin, at the same place.
    """
    source = Source.of(seed, dtype, device)
    value_parts = key_parts if value_parts is None else value_parts
    sides, forms = [], []
    for parts, width in zip((key_parts, value_parts), widths, strict=True):
        made = [source.rows(part, torch.tensor(lengths), width) for part, lengths in parts]
        forms.append(made)
        rows = range(len(parts[0][1]))
        sides.append([torch.cat([tokens(form, row) for form in made]) for row in rows])
    lengths = torch.tensor([len(tokens) for tokens in sides[0]])
    at = lengths.max() - lengths if aligned else torch.zeros_like(lengths)
    heads = len(lengths) // batch * group
    query = source.normal(batch, q, heads, widths[0]).to(device).transpose(1, 2)
    segments = cut(*forms, at)
    return Case(query, segments, *sides, at, widths[0] ** -0.5, needs)


def tokens(form: Form, row: int) -> Tensor:
    """float64 `[n, width]`: one row. Few bits are rounded as programs do it: to the dtype, but not
    in Triton's interpreter.
    """
    length = int(form.lengths[row])
    if isinstance(form, PackedRows):
        numbers = form.row(row, 0, length)
        return (numbers.to(form.grids.dtype) if numbers.is_cuda else numbers).double().cpu()
    start = int(form.starts[row])
    return form.numbers[start : start + length].double().cpu()
