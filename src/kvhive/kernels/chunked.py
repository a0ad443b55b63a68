"""Attention that also reports, in plain torch: one pass over chunks of queries, no n x n matrix.

A chunk of queries meets all the keys it may see at once: scores, softmax, column sums, times
values. Every row is complete within its chunk, so nothing is computed twice and no log-sum-exp is
needed; scratch memory is heads x CHUNK x n numbers. KV heads are never repeated: the queries that
share a KV head are stacked and meet it in one matrix product.
"""

from __future__ import annotations

import math

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
    used: int | None = None,
) -> tuple[Tensor, Observed]:
    """Same contract as `reference.attend`, in the dtype of the tensors (softmax in float32).

    used: how many of the slots of `keys` and `values` are in use; the rest is room that may be read
    but is not seen (see `span`). None: all of them.
    """
    q, n = query.shape[2], used or keys.shape[2]
    if q == 1:
        out, columns, rows = _decode(query, keys, values, scale, needs, valid, real, n)
    elif needs.columns is None and q == n and valid is None and real is None:
        out, columns = _fused(query, keys[:, :, :n], values[:, :, :n], scale), None
        rows = _tail_rows(query, keys, scale, needs, n)
    else:
        out, columns, rows = _one_pass(query, keys, values, scale, needs, valid, real, n)
    return out, _observed(query, keys, values, scale, needs, n, columns, rows)


def report(query: Tensor, keys: Tensor, values: Tensor, scale: float, needs: Needs) -> Observed:
    """What `attend` reports of a whole prompt without padding, for one more policy: the output is
    known already, so that only what is asked for is computed.
    """
    n = keys.shape[2]
    if needs.columns is None:
        columns, rows = None, _tail_rows(query, keys, scale, needs, n)
    else:
        _, columns, rows = _one_pass(query, keys, values, scale, needs, None, None, n)
    return _observed(query, keys, values, scale, needs, n, columns, rows)


def _observed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    n: int,
    columns: Tensor | None,
    rows: Tensor | None,
) -> Observed:
    return Observed(
        fresh=query.shape[2],
        columns=columns,
        rows=rows,
        keys=keys[:, :, :n] if needs.keys else None,
        values=values[:, :, :n] if needs.values else None,
        queries=query if needs.queries else None,
        scale=scale,
    )


def span(used: int, capacity: int) -> int:
    """How many of `capacity` slots to read when `used` are in use: `used`, rounded up a little.

    The CPU library that multiplies bf16 matrices compiles a kernel of its own for every size it
    meets and keeps it (0.6 MB each, up to 1,024 of them). Eight sizes to an octave bound that
    memory, which would otherwise grow with every token decoded.
    """
    step = max(64, 1 << max(used.bit_length() - 4, 0))
    return min(-(-used // step) * step, capacity)


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
    n: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One query a row: two skinny matrix products; the probabilities are there for the asking.

    `keys @ query` and not the other way round: on CPU a bf16 product that reads the keys row by row
    is several times faster than one against their transpose.
    """
    batch, heads, _, width = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    logits = (keys @ grouped.transpose(-1, -2)).transpose(-1, -2).float()
    logits[..., n:] = NEVER
    if valid is not None:
        logits[..., :n].masked_fill_(~valid[:, :, None, :], NEVER)
    weights = logits.mul_(scale).softmax(-1)
    if valid is not None:
        weights.nan_to_num_(0.0)
    out = (weights.to(values.dtype) @ values).view(batch, heads, 1, values.shape[-1])
    weights = weights[..., :n]
    if real is not None:
        weights = weights * real[:, :, None, None]
        out = out * real[:, :, None, None]
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
    n: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, heads, q, _ = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(batch, heads, q, values.shape[-1])
    columns = None
    if needs.columns:
        reporting = kv_heads if needs.fold else heads
        columns = query.new_zeros(batch, reporting, n, dtype=torch.float32)
    first_row = q - min(needs.last_rows, q)
    rows = query.new_zeros(batch, heads, q - first_row, n, dtype=torch.float32)
    scratch = _Scratch(query, keys, min(CHUNK, q))
    for start in range(0, q, CHUNK):
        stop = min(start + CHUNK, q)
        size, seen = stop - start, n - q + stop  # slots the chunk's last query may see
        weights = _chunk_weights(query, keys, scale, valid, n, start, stop, scratch)
        narrow = scratch.narrow(weights).view(batch, kv_heads, -1, weights.shape[-1])
        chunk_out = (narrow @ values[:, :, : weights.shape[-1]]).view(
            batch, heads, -1, out.shape[-1]
        )
        out[:, :, start:stop] = chunk_out[:, :, :size]
        weights = weights[:, :, :, :size, :seen]
        if real is not None:
            weights *= real[:, None, None, start:stop, None]
            out[:, :, start:stop] *= real[:, None, start:stop, None]
        votes = _columns(weights, needs, behind=q - stop)
        if columns is not None and votes is not None:
            columns[..., :seen] += votes
        if stop > first_row:
            begin = max(start, first_row)
            tail = weights[:, :, :, begin - start :].reshape(batch, heads, stop - begin, seen)
            rows[:, :, begin - first_row : stop - first_row, :seen] = tail
    return out, columns, rows if needs.last_rows else None


def _tail_rows(query: Tensor, keys: Tensor, scale: float, needs: Needs, n: int) -> Tensor | None:
    """Only the last rows were asked for: beside the fused kernel, they are done again."""
    if not needs.last_rows:
        return None
    batch, heads, q, _ = query.shape
    start = q - min(needs.last_rows, q)
    scratch = _Scratch(query, keys, q - start)
    weights = _chunk_weights(query, keys, scale, None, n, start, q, scratch)
    return weights[:, :, :, : q - start, :n].reshape(batch, heads, q - start, n)


class _Scratch:
    """Room for one chunk's logits and probabilities, reused by every chunk.

    Fresh tensors that grow by a few columns from chunk to chunk fit no hole their predecessors
    left, and would leave the heap many times as large as any of them.
    """

    def __init__(self, query: Tensor, keys: Tensor, rows: int) -> None:
        size = query.shape[0] * query.shape[1] * _even(rows) * keys.shape[2]
        self._logits = query.new_empty(size)
        self._weights = query.new_empty(size, dtype=torch.float32)

    def logits(self, *shape: int) -> Tensor:
        """Room in the model's dtype."""
        return self._logits[: math.prod(shape)].view(shape)

    def weights(self, *shape: int) -> Tensor:
        """Room in float32."""
        return self._weights[: math.prod(shape)].view(shape)

    def narrow(self, weights: Tensor) -> Tensor:
        """Probabilities in the model's dtype, where the logits were."""
        if weights.dtype == self._logits.dtype:
            return weights
        return self.logits(*weights.shape).copy_(weights)


def _even(rows: int) -> int:
    """Rows to compute for so many wanted: the next power of two, for few sizes (see `span`)."""
    return 1 << (rows - 1).bit_length()


def _chunk_weights(
    query: Tensor,
    keys: Tensor,
    scale: float,
    valid: Tensor | None,
    n: int,
    start: int,
    stop: int,
    scratch: _Scratch,
) -> Tensor:
    """Probabilities of queries start..stop-1 over the first slots, float32 `[b, K, group, rows,
    slots]`.

    rows and slots are rounded up: what lies behind the stop - start queries is of no meaning, and
    no query sees anything behind the slots it may see.
    """
    batch, heads, q, width = query.shape
    kv_heads, rows = keys.shape[1], _even(stop - start)
    group, slots = heads // kv_heads, span(n - q + stop, keys.shape[2])
    stacked = query.new_zeros(batch, kv_heads, group, rows, width)
    stacked[..., : stop - start, :] = query[:, :, start:stop].view(
        batch, kv_heads, group, stop - start, width
    )
    logits = scratch.logits(batch, kv_heads, group * rows, slots)
    torch.matmul(stacked.flatten(2, 3), keys[:, :, :slots].transpose(-1, -2), out=logits)
    logits = logits.mul_(scale).view(batch, kv_heads, group, rows, slots)
    first = n - q + start  # the first query's own slot
    hidden = torch.ones(rows, slots - first, dtype=torch.bool, device=query.device).triu(1)
    logits[..., first:].masked_fill_(hidden, NEVER)
    if valid is not None:
        held = min(n, slots)
        logits[..., :held].masked_fill_(~valid[:, :, None, None, :held], NEVER)
    weights = scratch.weights(*logits.shape)
    torch.softmax(logits, -1, dtype=torch.float32, out=weights)
    return weights if valid is None else weights.nan_to_num_(0.0)


def _columns(weights: Tensor, needs: Needs, behind: int) -> Tensor | None:
    """Column sums of `[b, K, group, rows, n]`; `behind` queries of the step come later."""
    if needs.columns is None:
        return None
    power = weights.square() if needs.columns == "square" else weights
    if needs.decay != 1.0:
        age = torch.arange(power.shape[3] - 1 + behind, behind - 1, -1, device=power.device)
        power = power * (needs.decay ** age.double()).float()[:, None]
    return power.sum((2, 3)) if needs.fold else power.sum(3).flatten(1, 2)
