"""Which kernel serves a step: chosen here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kvhive.kernels import (
    chunked,
    fused,
    native_columns,
    segments,
    triton_columns,
    triton_packed,
    triton_ragged,
    triton_tiles,
)
from kvhive.kernels.contracts import Ask, Observed, Rows
from kvhive.kernels.packed_segments import Segment
from kvhive.kernels.ragged import Extents, Seen

LAUNCHED = ("cuda",)  # devices on which Triton's programs are launched


def attend(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
    """Attention of the step's queries, and what `ask.needs` wants to know of it.

    query `[b, H, q, d]`; keys `[b, K, n, d]`; values `[b, K, n, e]`, of which the last q slots are
    the step's own tokens. Returns the output `[b, H, q, e]` in the query's dtype. The contract in
    slow motion: `reference.attend`.
    """
    if query.dtype != keys.dtype:
        out, seen = attend(query.to(keys.dtype), keys, values, ask)
        return out.to(query.dtype), seen
    columns: Tensor | None = None
    rows: Rows | None = None
    singly = query.shape[2] == 1
    apart = not singly and _counts_apart(query, keys, ask)
    together = ask.needs.attention if singly else ask.needs.columns is not None and not apart
    if not (together or ask.lse) and fused.fits(query, keys, values, ask):
        out = fused.attend(query, keys, values, ask)
        columns = native_columns.columns(query, keys, ask) if apart else None
    elif singly:
        out, columns, rows, lse = chunked.decode(query, keys, values, ask)
        return out, replace(_observed(query, keys, ask, columns, rows), lse=lse)
    elif ask.lse:
        out, lse = segments.segment(query, keys, values, ask)
        seen = segments.report(query, keys, lse, ask)
        held = keys if ask.needs.keys else None
        return out.to(query.dtype), replace(seen, keys=held, lse=lse)
    else:
        out, columns = chunked.attend(query, keys, values, ask)
    if ask.needs.last_rows:
        rows = chunked.tail_rows(query, keys, ask)
    return out, _observed(query, keys, ask, columns, rows)


def _counts_apart(query: Tensor, keys: Tensor, ask: Ask) -> bool:
    """Whether torch's fused attention and then columns in C beat one pass that does both: in 16
    bits. In float32 the pass, whose products are plain ones, is as fast or faster.
    """
    return keys.element_size() == 2 and ask.causal and native_columns.serves(query, keys, ask)


def report(query: Tensor, keys: Tensor, ask: Ask) -> Observed:
    """What `attend` reports, without attending: for one more policy on a step already computed, and
    for drafted tokens that were accepted.

    On a GPU, columns come from Triton where they fit; experimental: never run on a GPU yet.
    """
    query = query.to(keys.dtype)
    columns = _columns(query, keys, ask)
    return _observed(query, keys, ask, columns, chunked.tail_rows(query, keys, ask))


def _columns(query: Tensor, keys: Tensor, ask: Ask) -> Tensor | None:
    if native_columns.serves(query, keys, ask):
        return native_columns.columns(query, keys, ask)
    launched = keys.device.type in LAUNCHED and triton_tiles.available()
    if launched and triton_columns.fits(query, keys, ask):
        return triton_columns.columns(query, keys, ask)
    return chunked.columns(query, keys, ask)


def serves_ragged(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> bool:
    """Whether `attend_ragged` takes this step: few queries, none padded, on a GPU with Triton.

    query `[b, H, q, d]`, keys `[S, d]`, values `[S, e]`.
    """
    return _launches(query, keys, values, ask) and triton_tiles.available()


def attend_ragged(
    query: Tensor, keys: Tensor, values: Tensor, extents: Extents, ask: Ask
) -> tuple[Tensor, Seen]:
    """All rows in one launch: the output `[b, H, q, e]` and what `ask.needs` wants, flat.

    Experimental: never run on a GPU yet.
    """
    out, lse = triton_ragged.attend(query, keys, values, extents, ask.scale)
    if not ask.needs.attention:
        return out, Seen()
    return out, triton_ragged.report(query, keys, extents, lse, ask.scale, ask.needs)


def serves_packed(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> bool:
    """Whether `attend_packed` and `report_packed` take this step: few queries, none padded, on a
    GPU with a Triton that is new enough.

    query `[b, H, q, d]`; keys `[..., d]` and values `[..., e]`: those that are held exactly.
    """
    return _launches(query, keys, values, ask) and triton_packed.available()


def attend_packed(
    query: Tensor, segments: Sequence[Segment], ask: Ask, length: int
) -> tuple[Tensor, Observed]:
    """All segments of all rows in one launch: the output `[b, H, q, e]` and what `ask.needs` wants
    but the keys, which are left to the store, of n = `length` slots.

    Experimental: never run on a GPU yet.
    """
    out, lse = triton_packed.attend(query, segments, ask.scale)
    return out, triton_packed.report(query, segments, lse, ask.scale, ask.needs, length)


def report_packed(query: Tensor, segments: Sequence[Segment], ask: Ask, length: int) -> Observed:
    """What `attend_packed` reports."""
    return attend_packed(query, segments, ask, length)[1]


def _launches(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> bool:
    """Whether the step suits kernels that are launched once for all rows."""
    plain = ask.step.real is None and ask.valid is None and not ask.lse
    few = query.shape[2] <= triton_tiles.MOST
    alike = query.dtype == keys.dtype == values.dtype and keys.dtype in triton_tiles.DTYPES
    narrow = max(keys.shape[-1], values.shape[-1]) <= triton_tiles.WIDEST
    return plain and few and alike and narrow and keys.device.type in LAUNCHED


def _observed(
    query: Tensor, keys: Tensor, ask: Ask, columns: Tensor | None, rows: Rows | None
) -> Observed:
    return Observed(
        fresh=query.shape[2],
        columns=columns,
        rows=rows,
        queries=query if ask.needs.queries else None,
        keys=keys if ask.needs.keys else None,
        scale=ask.scale,
    )
