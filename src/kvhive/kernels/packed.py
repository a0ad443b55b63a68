"""Attention's two products with rows of few bits: which kernel serves them is chosen here."""

from __future__ import annotations

from torch import Tensor

from kvhive.kernels import native, packed_reference
from kvhive.kernels.packed_rows import PackedRows, Runs

__all__ = ["PackedRows", "Runs", "logits", "mix"]


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
