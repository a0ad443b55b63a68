"""Random packed rows for tests of kernels that read them, and attention's products, obviously."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels.bits import WIDTHS, packed
from kvhive.kernels.packed import PackedRows, Runs

HEADROOM = 3  # slots behind each row, at most
RUN = 40  # tokens of a run, at most
GRIDS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Case:
    """Rows, what they hold, and queries, weights and places for them. Grids that belong to no token
    are NaN, so that whoever reads one gives himself away.

    numbers: float64 `[n, width]` of each row; query `[R, G, width]`; weights `[R, G, N]`, with gaps
    between heads; at int64 `[R]`.
    """

    rows: PackedRows
    numbers: list[Tensor]
    query: Tensor
    weights: Tensor
    at: Tensor

    def logits(self, out: Tensor) -> Tensor:
        """What `logits` makes of `out`, in float64."""
        out = out.double()
        for row, numbers in enumerate(self.numbers):
            at = int(self.at[row])
            out[row, :, at : at + len(numbers)] = self.query[row].double() @ numbers.T
        return out

    def mix(self, out: Tensor) -> Tensor:
        """What `mix` makes of `out`, in float64."""
        out = out.double()
        for row, numbers in enumerate(self.numbers):
            at = int(self.at[row])
            out[row] += self.weights[row, :, at : at + len(numbers)].double() @ numbers
        return out


def case(
    lengths: Sequence[int],
    bits: int = 4,
    width: int = 64,
    group: int | None = 32,
    heads: int = 3,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Case:
    """Rows of these lengths, in any order; group None: their grids are per channel."""
    source = torch.Generator().manual_seed(seed)

    def upto(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most + 1, shape, generator=source)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    flat = torch.tensor(lengths)
    rooms = flat + upto(HEADROOM, len(flat))
    order = torch.randperm(len(flat), generator=source)
    starts = torch.empty_like(flat)
    starts[order] = rooms[order].cumsum(0) - rooms[order]
    codes = upto(2**bits - 1, int(rooms.sum()), width).to(torch.uint8)
    runs, owners = None, torch.full((len(codes),), -1)  # the grid of each slot
    for start, length in zip(starts.tolist(), flat.tolist(), strict=True):
        owners[start : start + length] = torch.arange(start, start + length)
    marks = len(codes)
    if group is None:
        runs, marks = _runs(starts, flat, owners, source)
    grids = normal(marks, 2, width // (group or 1)).to(dtype)
    unused = torch.ones(marks, dtype=torch.bool)
    unused[owners[owners >= 0]] = False
    scale, zero = grids.double().repeat_interleave(group or 1, -1).unbind(1)
    numbers = [
        codes[start : start + length] * scale[own] + zero[own]
        for start, length in zip(starts.tolist(), flat.tolist(), strict=True)
        for own in [owners[start : start + length]]
    ]
    grids[unused] = float("nan")
    at = upto(5, len(flat))
    places = int((at + flat).max()) + 2 if len(flat) else 2
    rows = PackedRows(
        bits, width, group or 1, packed(codes, bits), grids, starts, flat.clone(), runs
    )
    weights = normal(heads, len(flat), places).transpose(0, 1)
    return Case(rows, numbers, normal(len(flat), heads, width), weights, at)


def _runs(
    starts: Tensor, lengths: Tensor, owners: Tensor, source: torch.Generator
) -> tuple[Runs, int]:
    """Runs of any length, with unused ones between rows; `owners` is set to each token's run."""
    ends: list[int] = []
    begins, counts = [], []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        ends += [7] * int(torch.randint(0, 2, (), generator=source))
        begins.append(len(ends))
        end = 0
        while end < length:
            first = end
            end = min(end + int(torch.randint(1, RUN + 1, (), generator=source)), length)
            owners[start + first : start + end] = len(ends)
            ends.append(end)
        counts.append(len(ends) - begins[-1])
    where = Runs(torch.tensor(ends, dtype=torch.int32), torch.tensor(begins), torch.tensor(counts))
    return where, len(ends)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of any number and lengths, of any width and form of grid."""
    width = 8 * draw(st.sampled_from((1, 3, 8, 10, 12, 16, 32, 33)))
    groups = [size for size in (1, 4, 8, 16, 20, 32, 40, 64, width) if width % size == 0]
    return case(
        lengths=draw(st.lists(st.integers(0, 150), max_size=4)),
        bits=draw(st.sampled_from(WIDTHS)),
        width=width,
        group=draw(st.one_of(st.none(), st.sampled_from(groups))),
        heads=draw(st.integers(1, 10)),
        dtype=draw(st.sampled_from(GRIDS)),
        seed=draw(st.integers(0, 2**16)),
    )
