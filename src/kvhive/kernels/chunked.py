"""Attention that also reports, in plain torch: one pass over chunks of queries, no n x n matrix.

A chunk of queries meets all the keys it may see at once: logits, softmax, column sums, times
values. Every row is complete within its chunk, so nothing is computed twice; scratch memory is
heads x CHUNK x n numbers. KV heads are never repeated: the queries that share a KV head are stacked
and meet it in one matrix product. Queries are scaled first, logits are float32 at least: rounded to
16 bits they would be wrong by percents, and products of large keys would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvhive.kernels.contracts import Ask, Needs, Rows

CHUNK = 64  # queries a pass: measured best on CPU in bf16 and float32
NEVER = float("-inf")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float32, or float64 for models in that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decode(
    query: Tensor, keys: Tensor, values: Tensor, ask: Ask
) -> tuple[Tensor, Tensor | None, Rows | None, Tensor | None]:
    """One query a row: its probabilities over all slots are there for the asking.

    Shapes as `reference.attend`. Returns the output `[b, H, 1, e]`, columns, rows and log-sum-exp.
    """
    batch, heads, _, _ = query.shape
    kv_heads, n = keys.shape[1:3]
    logits = _logits_of_one(query, keys, ask)
    lse = logits.logsumexp(-1).view(batch, heads, 1) if ask.lse else None
    weights = logits.softmax(-1)
    if ask.valid is not None:
        weights.nan_to_num_(0.0)
    out = torch.bmm(weights, values.flatten(0, 1).to(weights.dtype))
    out = out.view(batch, heads, 1, values.shape[-1]).to(query.dtype)
    weights = weights.view(batch, kv_heads, heads // kv_heads, n)
    if ask.step.real is not None:
        real = ask.step.real[:, :, None, None]
        weights, out = weights * real, out * real
        lse = None if lse is None else lse.masked_fill(~real[..., 0], NEVER)
    columns: Tensor | None = None
    if ask.needs.columns is not None:
        power = weights.square() if ask.needs.columns == "square" else weights
        columns = power.sum(2).float() if ask.needs.fold else power.flatten(1, 2).float()
    rows = Rows.of(weights.view(batch, heads, 1, n).float()) if ask.needs.last_rows else None
    return out, columns, rows, lse


def _logits_of_one(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """`[b * K, H / K, n]` in float32 or better."""
    batch, heads, _, width = query.shape
    kv_heads = keys.shape[1]
    dtype = wide(keys.dtype)
    grouped = query.reshape(batch * kv_heads, heads // kv_heads, width).to(dtype) * ask.scale
    logits = torch.bmm(grouped, keys.flatten(0, 1).to(dtype).transpose(1, 2))
    if ask.valid is not None:
        logits.masked_fill_(~ask.valid.flatten(0, 1)[:, None], NEVER)
    return logits


def attend(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> tuple[Tensor, Tensor | None]:
    """Any number of queries: the output `[b, H, q, e]`, and the columns if they are asked for."""
    batch, heads, q, _ = query.shape
    kv_heads, real = keys.shape[1], ask.step.real
    out = query.new_empty(batch, heads, q, values.shape[-1])
    columns = _no_columns(query, keys, ask.needs)
    scratch = Scratch(query, keys, min(CHUNK, q))
    for start, stop, weights in _chunks(query, keys, ask, 0, scratch):
        narrow = scratch.narrow(weights, values.dtype).view(batch, kv_heads, -1, weights.shape[-1])
        part = (narrow @ values[:, :, : weights.shape[-1]]).view(batch, heads, -1, out.shape[-1])
        out[:, :, start:stop] = part[:, :, : stop - start]
        if real is not None:
            out[:, :, start:stop] *= real[:, None, start:stop, None]
        _add_columns(columns, weights, ask, start, stop)
    return out, columns


def columns(query: Tensor, keys: Tensor, ask: Ask) -> Tensor | None:
    """The columns alone, for one more policy on a prompt whose output is known."""
    total = _no_columns(query, keys, ask.needs)
    if total is not None:
        scratch = Scratch(query, keys, min(CHUNK, query.shape[2]))
        for start, stop, weights in _chunks(query, keys, ask, 0, scratch):
            _add_columns(total, weights, ask, start, stop)
    return total


def tail_rows(query: Tensor, keys: Tensor, ask: Ask) -> Rows | None:
    """The last rows, worked out when they are read, a chunk at a time."""
    q, n = query.shape[2], keys.shape[2]
    count = min(ask.needs.last_rows, q)
    if not count:
        return None
    batch, heads, real = query.shape[0], query.shape[1], ask.step.real

    def block(start: int, stop: int) -> Tensor:
        first, last = q - count + start, q - count + stop
        scratch = Scratch(query, keys, last - first)
        weights = chunk_weights(query, keys, ask, first, last, scratch)
        rows = weights.new_zeros(batch, heads, last - first, n, dtype=torch.float32)
        seen = min(n, weights.shape[-1])
        rows.view(*weights.shape[:3], last - first, n)[..., :seen] = weights[
            :, :, :, : last - first, :seen
        ]
        return rows if real is None else rows.mul_(real[:, None, first:last, None])

    return Rows(count, block, CHUNK)


def columns_of(weights: Tensor, needs: Needs, behind: int = 0) -> Tensor | None:
    """Column sums of `[b, K, group, rows, n]`; `behind` queries of the step come later."""
    if needs.columns is None:
        return None
    power = weights.square() if needs.columns == "square" else weights
    if needs.decay != 1.0:
        age = torch.arange(power.shape[3] - 1 + behind, behind - 1, -1, device=power.device)
        power = power * (needs.decay ** age.double()).to(power.dtype)[:, None]
    return power.sum((2, 3)).float() if needs.fold else power.sum(3).flatten(1, 2).float()


def _no_columns(query: Tensor, keys: Tensor, needs: Needs) -> Tensor | None:
    if needs.columns is None:
        return None
    heads = keys.shape[1] if needs.fold else query.shape[1]
    return query.new_zeros(query.shape[0], heads, keys.shape[2], dtype=torch.float32)


def _add_columns(columns: Tensor | None, weights: Tensor, ask: Ask, start: int, stop: int) -> None:
    """Add what queries start..stop-1 gave to the columns, in place."""
    if columns is None:
        return
    q, n = ask.step.fresh, columns.shape[-1]
    seen = n - q + stop if ask.causal else n
    weights = weights[:, :, :, : stop - start, :seen]
    if ask.step.real is not None:
        weights = weights * ask.step.real[:, None, None, start:stop, None]
    votes = columns_of(weights, ask.needs, behind=q - stop)
    assert votes is not None
    columns[..., :seen] += votes


def _chunks(
    query: Tensor, keys: Tensor, ask: Ask, first: int, scratch: Scratch
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, probabilities) of all queries from `first` on, CHUNK at a time."""
    q = query.shape[2]
    for start in range(first, q, CHUNK):
        stop = min(start + CHUNK, q)
        yield start, stop, chunk_weights(query, keys, ask, start, stop, scratch)


class Scratch:
    """The keys in float32, and room for one chunk's logits, reused by every chunk.

    Fresh tensors that grow by a few columns from chunk to chunk fit no hole their predecessors
    left, and would leave the heap many times as large as any of them.
    """

    def __init__(self, query: Tensor, keys: Tensor, rows: int) -> None:
        self.keys = keys.flatten(0, 1).to(wide(keys.dtype))
        size = query.shape[0] * query.shape[1] * even(rows) * keys.shape[2]
        self._logits = self.keys.new_empty(size)
        self._weights = self.keys.new_empty(size)
        self._narrow: Tensor | None = None

    def logits(self, *shape: int) -> Tensor:
        """Room for logits."""
        return self._logits[: math.prod(shape)].view(shape)

    def weights(self, *shape: int) -> Tensor:
        """Room for probabilities."""
        return self._weights[: math.prod(shape)].view(shape)

    def narrow(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Probabilities in the values' dtype."""
        if weights.dtype == dtype:
            return weights
        if self._narrow is None:
            self._narrow = self._logits.new_empty(self._logits.numel(), dtype=dtype)
        return self._narrow[: weights.numel()].view(weights.shape).copy_(weights)


def even(rows: int) -> int:
    """Rows to compute for so many wanted: the next power of two, for few sizes (see `span`)."""
    return 1 << (rows - 1).bit_length()


def span(used: int, most: int) -> int:
    """How many of `most` slots to read when `used` are seen: `used`, rounded up a little.

    The CPU library that multiplies bf16 matrices compiles a kernel of its own for every size it
    meets and keeps it (0.6 MB each, up to 1,024 of them). Eight sizes to an octave bound that
    memory, which would otherwise grow with every prompt.
    """
    step = max(64, 1 << max(used.bit_length() - 4, 0))
    return min(-(-used // step) * step, most)


def chunk_weights(
    query: Tensor, keys: Tensor, ask: Ask, start: int, stop: int, scratch: Scratch
) -> Tensor:
    """Probabilities of queries start..stop-1 over the first slots, `[b, K, group, rows, slots]`.

    rows and slots are rounded up: what lies behind the stop - start queries is of no meaning, and
    no query sees anything behind the slots it may see.
    """
    batch, heads, q, width = query.shape
    kv_heads, n = keys.shape[1:3]
    group, rows = heads // kv_heads, even(stop - start)
    slots = span(n - q + stop, n) if ask.causal else n
    stacked = scratch.keys.new_zeros(batch, kv_heads, group, rows, width)
    stacked[..., : stop - start, :] = query[:, :, start:stop].unflatten(1, (kv_heads, group))
    stacked.mul_(ask.scale)
    logits = scratch.logits(batch * kv_heads, group * rows, slots)
    stacked = stacked.view(batch * kv_heads, group * rows, width)
    torch.bmm(stacked, scratch.keys[:, :slots].transpose(1, 2), out=logits)
    logits = logits.view(batch, kv_heads, group, rows, slots)
    if ask.causal:
        first = n - q + start  # the first query's own slot
        hidden = torch.ones(rows, slots - first, dtype=torch.bool, device=query.device).triu(1)
        logits[..., first:].masked_fill_(hidden, NEVER)
    if ask.valid is not None:
        logits.masked_fill_(~ask.valid[:, :, None, None, :slots], NEVER)
    weights = torch.softmax(logits, -1, out=scratch.weights(*logits.shape))
    return weights if ask.valid is None else weights.nan_to_num_(0.0)
