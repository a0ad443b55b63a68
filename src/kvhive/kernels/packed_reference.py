"""Attention's two products with packed rows, and what packs them, in torch alone: on any device,
and what every kernel is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels.bits import grid, packed, rounded
from kvhive.kernels.packed_rows import PackedRows

BLOCK = 512  # tokens of a row that are unpacked at a time


def logits(query: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """Products of float32 queries `[R, G, width]` with the tokens of their row, written to float32
    `out[r, :, at[r] : at[r] + lengths[r]]`; `out` is `[R, G, N]`, `at` int64 `[R]` on the CPU.

    Nothing else of `out` is touched. No more than BLOCK tokens are unpacked at a time.
    """
    for row, (length, place) in enumerate(zip(rows.lengths.tolist(), at.tolist(), strict=True)):
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            product = query[row] @ rows.row(row, first, last).T
            out[row, :, place + first : place + last] = product


def mix(weights: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """Add to float32 `out` `[R, G, width]` the tokens of each row, weighed by float32
    `weights[r, :, at[r] : at[r] + lengths[r]]`; shapes as in `logits`.
    """
    for row, (length, place) in enumerate(zip(rows.lengths.tolist(), at.tolist(), strict=True)):
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            out[row] += weights[row, :, place + first : place + last] @ rows.row(row, first, last)


def coded(
    numbers: Tensor, bits: int, group: int, dtype: torch.dtype, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens `[N, width]` as a `PackedRows` holds them: codes uint8 `[N, width * bits / 8]` and
    grids `[M, 2, width / group]` in `dtype`.

    ends: int64 `[M]` on the CPU, the token behind each run of tokens that share a grid, where group
    is 1; None: each token has a grid of its own for each `group` of its numbers.
    """
    if ends is None:
        groups = numbers.unflatten(-1, (-1, group))
        least, largest = groups.aminmax(dim=-1)
        grids = grid(least, largest, bits, dtype)
        codes = rounded(groups, grids[:, 0, :, None], grids[:, 1, :, None], bits).flatten(-2)
        return packed(codes, bits), grids
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    sizes = ends - first[: len(ends)]
    longest = int(sizes.max()) if len(sizes) else 1
    inside = torch.minimum(torch.arange(longest), sizes[:, None] - 1)
    runs = numbers[(first[: len(ends), None] + inside).to(numbers.device)]  # the last one again
    least, largest = runs.aminmax(dim=1)
    grids = grid(least, largest, bits, dtype)
    each = grids.repeat_interleave(sizes.to(numbers.device), 0)
    return packed(rounded(numbers, each[:, 0], each[:, 1], bits), bits), grids
