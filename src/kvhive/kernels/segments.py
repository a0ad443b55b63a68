"""Attention over the parts of a store: each by itself, merged by their log-sum-exp.

For stores whose tokens lie in several forms (packed and exact, wide and thin). Three steps:
`segment` for each part, `merge`, and, where a policy wants to know what was seen, `report` for each
part with the merged log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvhive.kernels.chunked import CHUNK, columns_of, wide
from kvhive.kernels.contracts import Ask, Observed, Rows

NEVER = float("-inf")


def segment(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> tuple[Tensor, Tensor]:
    """Attention of `[b, H, q, d]` queries to the slots of one segment.

    Returns the output, normalised within the segment, `[b, H, q, e]`, and the natural logarithm of
    the sum of exp(logit), `[b, H, q]` (minus infinity where nothing is seen); float32 or better.
    """
    batch, heads, q, _ = query.shape
    out = torch.empty(batch, heads, q, values.shape[-1], dtype=wide(query.dtype)).to(query.device)
    lse = out.new_empty(batch, heads, q)
    broad = values.to(out.dtype)[:, :, None]
    for start in range(0, q, CHUNK):
        stop = min(start + CHUNK, q)
        logits = _logits(query, keys, ask, start, stop)
        total = logits.logsumexp(-1)
        weights = (logits - total[..., None]).exp_().nan_to_num_(0.0)
        out[:, :, start:stop] = (weights @ broad).flatten(1, 2)
        lse[:, :, start:stop] = total.flatten(1, 2)
    return out, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp over all segments, from those of each; zeros where none sees."""
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    merged = torch.zeros_like(parts[0][0])
    for out, lse in parts:
        merged += out * (lse - total).exp_().nan_to_num_(0.0)[..., None]
    return merged, total


def report(query: Tensor, keys: Tensor, lse: Tensor, ask: Ask) -> Observed:
    """What the queries gave the slots of one segment, where `lse` `[b, H, q]` is that of all."""
    batch, heads, q, _ = query.shape
    needs, kv_heads, n = ask.needs, keys.shape[1], keys.shape[2]
    grouped = lse.reshape(batch, kv_heads, -1, q)

    def weights(start: int, stop: int) -> Tensor:
        logits = _logits(query, keys, ask, start, stop)
        return (logits - grouped[:, :, :, start:stop, None]).exp_().nan_to_num_(0.0)

    columns: Tensor | None = None
    for start in range(0, q if needs.columns else 0, CHUNK):
        stop = min(start + CHUNK, q)
        votes = columns_of(weights(start, stop), needs, behind=q - stop)
        columns = votes if columns is None or votes is None else columns + votes
    count = min(needs.last_rows, q)

    def block(start: int, stop: int) -> Tensor:
        rows = weights(q - count + start, q - count + stop)
        return rows.reshape(batch, heads, stop - start, n).float()

    return Observed(
        fresh=q,
        columns=columns,
        rows=Rows(count, block, CHUNK) if count else None,
        queries=query if needs.queries else None,
        scale=ask.scale,
    )


def _logits(query: Tensor, keys: Tensor, ask: Ask, start: int, stop: int) -> Tensor:
    """`[b, K, group, stop - start, n]`; minus infinity where a query does not see a slot."""
    kv_heads, n, q = keys.shape[1], keys.shape[2], query.shape[2]
    dtype = wide(keys.dtype)
    some = query[:, :, start:stop].to(dtype) * ask.scale
    grouped = some.reshape(len(query), kv_heads, -1, stop - start, query.shape[3])
    logits: Tensor = grouped @ keys.to(dtype)[:, :, None].transpose(-1, -2)
    if ask.causal:
        own = torch.arange(n - q + start, n - q + stop, device=query.device)
        hidden = torch.arange(n, device=query.device) > own[:, None]
        logits.masked_fill_(hidden, NEVER)
    if ask.valid is not None:
        logits.masked_fill_(~ask.valid[:, :, None, None], NEVER)
    if ask.step.real is not None:
        logits.masked_fill_(~ask.step.real[:, None, None, start:stop, None], NEVER)
    return logits


def of_part(ask: Ask, first: int, last: int, own: bool) -> Ask:
    """The same for slots first..last-1 alone; own: whether the step's own tokens are among them."""
    valid = None if ask.valid is None else ask.valid[:, :, first:last]
    return replace(ask, valid=valid, causal=ask.causal and own)
