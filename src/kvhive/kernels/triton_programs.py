"""Triton programs for ragged rows; `triton_ragged` launches them and says what they are for."""

from __future__ import annotations

import triton
import triton.language as tl

from kvhive.kernels.triton_pieces import (
    NEVER,
    absorb,
    entries,
    factors,
    load_block,
    masked_logits,
    merge,
    store_part,
    votes,
)

__all__ = ["attend", "factors", "merge", "report"]


@triton.jit(do_not_specialize=["splits"])
def attend(
    query,
    keys,
    values,
    starts,
    lengths,
    valid,
    parts,
    part_lse,
    scale,
    splits,
    GROUP: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    WIDE_E: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One split of one row for one tile of its queries: `parts` `[R, splits, GROUP * Q, E]`,
    normalised within the split, and `part_lse` `[R, splits, GROUP * Q]`. Splits beyond the row's
    length are left unwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    if split * SPLIT >= length:
        return
    start = tl.load(starts + row).to(tl.int64)
    head, number, real = entries(tl.program_id(2), GROUP, Q, HEADS, QUERIES)
    entry = head * Q + number
    queries = load_block(query, row * GROUP * Q + entry, real, D, WIDE_D)

    most = tl.full([HEADS * QUERIES], NEVER, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    sums = tl.zeros([HEADS * QUERIES, WIDE_E], tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
        place = first + tl.arange(0, BLOCK)
        slot = start + place
        there = place < length
        if valid is not None:
            there = there & (tl.load(valid + slot, mask=there, other=0) != 0)
        key = load_block(keys, slot, there, D, WIDE_D)
        logits = masked_logits(queries, key, there, length - Q + number, place, scale, FACTORS)
        value = load_block(values, slot, there, E, WIDE_E)
        most, total, sums = absorb(logits, value, most, total, sums, FACTORS)
    target = (row * splits + split) * GROUP * Q + entry
    store_part(parts, part_lse, target, real, most, total, sums, E, WIDE_E)


@triton.jit(do_not_specialize=["slots"])
def report(
    query,
    keys,
    starts,
    lengths,
    valid,
    lse,
    columns,
    rows,
    scale,
    log_decay,
    slots,
    GROUP: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SQUARE: tl.constexpr,
    FOLD: tl.constexpr,
    LAST: tl.constexpr,
):
    """What one block of a row's slots received from all its queries: `columns` `[slots]` or
    `[GROUP, slots]`, and `rows` `[GROUP, LAST, slots]`; either may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= length:
        return
    slot = tl.load(starts + row).to(tl.int64) + place
    held = place < length
    there = held
    if valid is not None:
        there = there & (tl.load(valid + slot, mask=held, other=0) != 0)
    key = load_block(keys, slot, there, D, WIDE_D)
    votes(
        query,
        key,
        there,
        held,
        place,
        length,
        lse,
        columns,
        rows,
        slot,
        slots,
        row,
        scale,
        log_decay,
        GROUP,
        Q,
        D,
        WIDE_D,
        HEADS,
        QUERIES,
        FACTORS,
        BLOCK,
        TILES,
        SQUARE,
        FOLD,
        LAST,
    )
