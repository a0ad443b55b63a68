"""Which kernel serves a step: chosen here, and nowhere else."""

from __future__ import annotations

from torch import Tensor

from kvhive.kernels import chunked, fused
from kvhive.kernels.contracts import Ask, Observed, Rows


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
    asked = ask.needs.attention if singly else ask.needs.columns is not None
    if not asked and fused.fits(query, keys, values, ask):
        out = fused.attend(query, keys, values, ask)
    elif singly:
        out, columns, rows = chunked.decode(query, keys, values, ask)
        return out, _observed(query, keys, ask, columns, rows)
    else:
        out, columns = chunked.attend(query, keys, values, ask)
    if ask.needs.last_rows:
        rows = chunked.tail_rows(query, keys, ask)
    return out, _observed(query, keys, ask, columns, rows)


def report(query: Tensor, keys: Tensor, ask: Ask) -> Observed:
    """What `attend` reports, without attending: for one more policy on a step already computed, and
    for drafted tokens that were accepted.
    """
    query = query.to(keys.dtype)
    columns = chunked.columns(query, keys, ask)
    return _observed(query, keys, ask, columns, chunked.tail_rows(query, keys, ask))


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
