"""Rows of few bits are made, and attention's two products with them: which kernel serves is chosen
here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import native, packed_reference
from kvhive.kernels.packed_rows import PackedRows, Runs

__all__ = ["PackedRows", "Runs", "coded", "logits", "mix"]


def logits(query: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """Products of float32 queries `[R, G, width]` with the tokens of their row, written to float32
    `out[r, :, at[r] : at[r] + lengths[r]]`; `out` is `[R, G, N]`, `at` int64 `[R]` on the CPU.

    Nothing else of `out` is touched. The cache is never unpacked as a whole.
    """
    kernel = native if native.serves(rows, query, out) else packed_reference
    kernel.logits(query, rows, out, at)


def mix(weights: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """Add to float32 `out` `[R, G, width]` the tokens of each row, weighed by float32
    `weights[r, :, at[r] : at[r] + lengths[r]]`; shapes as in `logits`.
    """
    kernel = native if native.serves(rows, out, weights) else packed_reference
    kernel.mix(weights, rows, out, at)


def coded(
    numbers: Tensor, bits: int, group: int, dtype: torch.dtype, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens `[N, width]` as a `PackedRows` holds them: codes uint8 `[N, width * bits / 8]` and
    grids `[M, 2, width / group]` in `dtype`.

    ends: int64 `[M]` on the CPU, the token behind each run of tokens that share a grid, where group
    is 1; None: each token has a grid of its own for each `group` of its numbers.
    """
    if native.codes(numbers, dtype):
        return native.coded(numbers, bits, group, dtype, ends)
    return packed_reference.coded(numbers, bits, group, dtype, ends)
