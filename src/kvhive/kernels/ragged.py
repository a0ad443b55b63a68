"""Rows of unequal lengths in one flat array, as kernels for them read it; see `ragged_reference`
for what they compute and `triton_ragged` for a fast one.

A row is one KV head of one row of the batch, row r = batch row * K + KV head, and R = b * K. Keys
`[S, d]` and values `[S, e]` of all rows lie in one array each; a row's slots are consecutive there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Extents:
    """Where each of R rows lies among S flat slots, known to the device; nothing is asked of it.

    starts: int32 or int64 `[R]`, its first slot. lengths: int32 or int64 `[R]`, slots in use, which
    may be none; what lies behind them is not read. longest: the largest length or more, on the
    host: slots beyond it are not read, however long a row is. valid: bool `[S]`, False for slots
    that nobody sees (padding that was decoded); None: all are seen.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What attention to ragged rows reports, slot by slot, float32, zero in slots of no row. Only
    what was asked for is present.

    columns: `[S]`, summed over the step's queries and the query heads that share the KV head;
    without fold `[group, S]`, the g-th query head of each slot's own KV head.
    rows: `[group, r, S]`, probabilities of the last r = min(last_rows, q) queries, oldest first.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
