"""Triton programs for column sums of dense keys; `triton_columns` launches them and says what they
are for.

A row is STACK consecutive query heads of one batch row that meet the keys of one KV head. Its
entries are its queries, those of one token for all heads, then those of the next: tiles of ROWS
entries waste nothing, whatever the group, and are almost of one age. HEADS query heads there are in
all, GROUP for each KV head. Steps from one head, token or slot to the next are counted in numbers;
numbers of one head are side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvhive.kernels.triton_pieces import NEVER, factors, load_rows, log_sum, masked_logits, weigh

__all__ = ["factors", "log_sums", "received"]


@triton.jit
def _rows(
    query,
    keys,
    query_batch,
    query_head,
    key_batch,
    key_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
):
    """The program's row, and where its queries and its keys begin."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // (HEADS // STACK), row % (HEADS // STACK) * STACK
    query += batch * query_batch + head * query_head
    keys += batch * key_batch + head // GROUP * key_head
    return row, query, keys


@triton.jit
def _tile(
    query,
    first,
    query_head,
    query_token,
    q,
    n,
    STACK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Queries `[ROWS, WIDE_D]` from entry `first` on, whether each is there, the last slot that it
    sees, and its place in the row's part of an array `[b, H, q]`.
    """
    entry = first + tl.arange(0, ROWS)
    head, number = (entry % STACK).to(tl.int64), (entry // STACK).to(tl.int64)
    there = number < q
    queries = load_rows(query, head * query_head + number * query_token, there, D, WIDE_D)
    last = n - q + number if CAUSAL else n - 1 + number * 0
    return queries, there, last.to(tl.int32), head * q + number


@triton.jit(do_not_specialize=["q", "n", "split"])
def log_sums(
    query,
    keys,
    lse,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_slot,
    scale,
    q,
    n,
    split,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    FACTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Of the queries of one tile the log-sum-exp over one split of the slots: `lse` `[splits, b, H,
    q]`. The newest queries, which see most, come first.
    """
    row, query, keys = _rows(
        query, keys, query_batch, query_head, key_batch, key_head, HEADS, GROUP, STACK
    )
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    queries, real, last, target = _tile(
        query, tile * ROWS, query_head, query_token, q, n, STACK, ROWS, D, WIDE_D, CAUSAL
    )
    begin = tl.program_id(2) * split
    end = tl.minimum(tl.minimum(begin + split, n), tl.max(last, 0) + 1)
    most = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        there = place < end
        key = load_rows(keys, place.to(tl.int64) * key_slot, there, D, WIDE_D)
        logits = masked_logits(queries, key, there, last, place, scale, FACTORS)
        most, total, _, _ = weigh(logits, most, total)
    lse += (tl.program_id(2) * tl.num_programs(0).to(tl.int64) + row) * STACK * q
    tl.store(lse + target, log_sum(most, total), mask=real)


@triton.jit(do_not_specialize=["q", "n"])
def received(
    query,
    keys,
    lse,
    columns,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_slot,
    scale,
    q,
    n,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    FACTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """What one block of slots received from all queries of its row, `columns` `[b, H / STACK, n]`,
    `lse` being `[b, H, q]`.
    """
    row, query, keys = _rows(
        query, keys, query_batch, query_head, key_batch, key_head, HEADS, GROUP, STACK
    )
    lse += row * STACK * q
    first = tl.program_id(1) * BLOCK
    place = first + tl.arange(0, BLOCK)
    held = place < n
    key = load_rows(keys, place.to(tl.int64) * key_slot, held, D, WIDE_D)
    oldest = tl.maximum(first - (n - q), 0) if CAUSAL else 0
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(oldest * STACK, q * STACK, ROWS):
        queries, real, last, source = _tile(
            query, start, query_head, query_token, q, n, STACK, ROWS, D, WIDE_D, CAUSAL
        )
        logits = masked_logits(queries, key, held, last, place, scale, FACTORS)
        whole = tl.load(lse + source, mask=real, other=float("inf"))
        weights = tl.exp(logits - whole[:, None])
        total += tl.sum(weights * weights if SQUARE else weights, 0)
    tl.store(columns + row * n + place, total, mask=held)
