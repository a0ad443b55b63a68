"""Attention that also reports, in plain torch: one pass over chunks of queries, no n x n matrix.

A chunk of queries meets all the keys it may see at once: scores, softmax, column sums, times values.
Every row is complete within its chunk, so nothing is computed twice and no log-sum-exp is needed;
scratch memory is heads x CHUNK x n numbers. KV heads are never repeated: the queries that share a
KV head are stacked and meet it in one matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels.contracts import Needs, Observed

CHUNK = 64  # queries a pass: 64-128 measured best on CPU in bf16 and float32
NEVER = float("-inf")


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    valid: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Observed]:
    """Same contract as `reference.attend`, in the dtype of the tensors (softmax in float32)."""
    q, n = query.shape[2], keys.shape[2]
    if q == 1:
        out, columns, rows = _decode(query, keys, values, scale, needs, valid, real)
    elif needs.columns is None and q == n and valid is None and real is None:
        out, columns = _fused(query, keys, values, scale), None
        rows = _tail_rows(query, keys, values, scale, needs, valid, real)
    else:
        out, columns, rows = _one_pass(query, keys, values, scale, needs, valid, real)
    observed = Observed(
        fresh=q,
        columns=columns,
        rows=rows,
        keys=keys if needs.keys else None,
        values=values if needs.values else None,
        queries=query if needs.queries else None,
    )
    return out, observed


def _fused(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A whole prompt with nothing to report and nothing to hide: torch's own causal attention."""
    return F.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    valid: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One query a row: two skinny matrix products; the probabilities are there for the asking.

    `keys @ query` and not the other way round: on CPU a bf16 product that reads the keys row by row
    is several times faster than one against their transpose.
    """
    batch, heads, _, width = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    logits = (keys @ grouped.transpose(-1, -2)).transpose(-1, -2).float()
    weights = _softmax(logits.mul_(scale), None if valid is None else valid[:, :, None, :])
    out = (weights.to(values.dtype) @ values).view(batch, heads, 1, values.shape[-1])
    if real is not None:
        weights = weights * real[:, :, None, None]
    columns = _columns(weights[..., None, :], needs, behind=0)
    rows = weights.reshape(batch, heads, 1, n) if needs.last_rows else None
    return out, columns, rows


def _one_pass(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    valid: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, heads, q, _ = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    out = query.new_empty(batch, heads, q, values.shape[-1])
    columns = None
    if needs.columns:
        reporting = kv_heads if needs.fold else heads
        columns = query.new_zeros(batch, reporting, n, dtype=torch.float32)
    first_row = q - min(needs.last_rows, q)
    rows = query.new_zeros(batch, heads, q - first_row, n, dtype=torch.float32)
    for start in range(0, q, CHUNK):
        stop = min(start + CHUNK, q)
        seen = n - q + stop  # slots the chunk's last query may see
        weights = _chunk_weights(query, keys, scale, valid, real, start, stop)
        stacked = weights.to(values.dtype).view(batch, kv_heads, -1, seen)
        chunk_out = (stacked @ values[:, :, :seen]).view(batch, heads, stop - start, -1)
        out[:, :, start:stop] = chunk_out
        if columns is not None:
            columns[..., :seen] += _columns(weights, needs, behind=q - stop)
        if stop > first_row:
            begin = max(start, first_row)
            tail = weights[:, :, :, begin - start :].reshape(batch, heads, stop - begin, seen)
            rows[:, :, begin - first_row : stop - first_row, :seen] = tail
    return out, columns, rows if needs.last_rows else None


def _tail_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    valid: Tensor | None,
    real: Tensor | None,
) -> Tensor | None:
    """Only the last rows were asked for: the fused kernel did the work, they alone are done again."""
    if not needs.last_rows:
        return None
    batch, heads, q, _ = query.shape
    start = q - min(needs.last_rows, q)
    weights = _chunk_weights(query, keys, scale, valid, real, start, q)
    return weights.reshape(batch, heads, q - start, keys.shape[2])


def _chunk_weights(
    query: Tensor,
    keys: Tensor,
    scale: float,
    valid: Tensor | None,
    real: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """Probabilities of queries start..stop-1, float32 `[b, K, group, rows, slots they may see]`."""
    batch, heads, q, width = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    group, size, seen = heads // kv_heads, stop - start, n - q + stop
    stacked = query[:, :, start:stop].reshape(batch, kv_heads, group * size, width)
    logits = stacked @ keys[:, :, :seen].transpose(-1, -2)
    logits = logits.view(batch, kv_heads, group, size, seen).mul_(scale)
    hidden = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    logits[..., seen - size :].masked_fill_(hidden, NEVER)
    if valid is None and real is None:
        return logits.softmax(-1, dtype=torch.float32)
    weights = _softmax(
        logits.float(), None if valid is None else valid[:, :, None, None, :seen]
    )
    return weights if real is None else weights * real[:, None, None, start:stop, None]


def _softmax(logits: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last axis; a row that sees nothing is all zeros, not NaN."""
    if visible is None:
        return logits.softmax(-1)
    return logits.masked_fill_(~visible, NEVER).softmax(-1).nan_to_num_(0.0)


def _columns(weights: Tensor, needs: Needs, behind: int) -> Tensor | None:
    """Column sums of `[b, K, group, rows, n]`; `behind` queries of the step come after these rows."""
    if needs.columns is None:
        return None
    power = weights.square() if needs.columns == "square" else weights
    if needs.decay != 1.0:
        age = torch.arange(power.shape[3] - 1 + behind, behind - 1, -1, device=power.device)
        power = power * (needs.decay ** age.double()).float()[:, None]
    return power.sum((2, 3)) if needs.fold else power.sum(3).flatten(1, 2)
