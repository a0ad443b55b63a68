"""Attention's two products with packed rows, in torch alone: on any device, and what every kernel
is tested against.
"""

from __future__ import annotations

from torch import Tensor

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
