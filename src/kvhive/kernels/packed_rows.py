"""Rows of tokens in few bits.

A row is one KV head of one row of the batch. Rows of any lengths lie one after another in one flat
array, each with room to grow. A token's codes are bytes of its own (`bits.packed`), so that
whatever is dropped, the rest is moved as it is. Its grid is its own too, one for each group of its
channels (`per token`); or it is that of a run of tokens that follow each other, one for each
channel (`per channel`, KIVI's form for keys). A run never goes on in another row, and loses its
grid only with its last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.kernels.bits import unpacked


@dataclass(eq=False)
class Runs:
    """The runs of rows whose grid is per channel.

    ends: int32 `[M]`, for each run the place in its row where it ends; starts, counts: int64 `[R]`
    on the CPU, where the runs of a row begin in `ends` (and in the grids), and how many there are.
    """

    ends: Tensor
    starts: Tensor
    counts: Tensor


@dataclass(eq=False)
class PackedRows:
    """R rows of tokens of `width` numbers, `bits` each.

    codes: uint8 `[S, width * bits / 8]`. grids: `[M, 2, width / group]`, scale and zero (number =
    code x scale + zero) in a float dtype; M = S where runs is None, each slot having its own; else
    one a run, and group is 1. starts, lengths: int64 `[R]` on the CPU: slot of a row's first token,
    and its tokens. Slots between a row's end and the next row are room to grow, and hold anything.
    """

    bits: int
    width: int
    group: int
    codes: Tensor
    grids: Tensor
    starts: Tensor
    lengths: Tensor
    runs: Runs | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def row(self, row: int, first: int, last: int) -> Tensor:
        """float32 `[last - first, width]`: tokens first..last-1 of a row, unpacked."""
        start = int(self.starts[row])
        codes = unpacked(self.codes[start + first : start + last], self.bits, self.width)
        if self.runs is None:
            grids = self.grids[start + first : start + last]
        else:
            begin, count = int(self.runs.starts[row]), int(self.runs.counts[row])
            ends = self.runs.ends[begin : begin + count]
            token = torch.arange(first, last, dtype=ends.dtype, device=ends.device)
            grids = self.grids[begin + torch.searchsorted(ends, token, right=True)]
        scale, zero = grids.float().unbind(1)
        numbers: Tensor = codes.float().unflatten(-1, (-1, self.group))
        return numbers.mul_(scale[..., None]).add_(zero[..., None]).flatten(-2)
