"""Triton programs for ragged rows; `triton_ragged` launches them and says what they are for.

Each works on one row. Tiles of queries are HEADS query heads x QUERIES queries, one after another
for each head; what is not there is masked. Widths are padded to powers of two, WIDE_D and WIDE_E.
Differences of infinities never arise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))
FACTORS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def factors(dtype: torch.dtype) -> tl.dtype:
    """In what matrix products take their factors: as they are, or, in Triton's interpreter, which
    takes bfloat16 numbers for integers, in float32.
    """
    return FACTORS[dtype] if isinstance(attend, triton.JITFunction) else tl.float32


@triton.jit
def _place(tile, GROUP: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """Of each query of a tile: its head within the group, its number, and whether it is there."""
    entry = tl.arange(0, HEADS * QUERIES)
    head = tile * HEADS + entry // QUERIES
    number = entry % QUERIES
    return head, number, (head < GROUP) & (number < Q)


@triton.jit
def _block(flat, slot, there, W: tl.constexpr, WIDE: tl.constexpr):
    """`[slots, WIDE]` of flat `[S, W]`, zeros where nothing is."""
    column = tl.arange(0, WIDE)
    mask = there[:, None] & (column < W)[None, :]
    return tl.load(flat + slot[:, None] * W + column[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    queries, keys, there, number, place, length, scale, Q: tl.constexpr, FACTORS: tl.constexpr
):
    """`[queries, slots]`, minus infinity where a query does not see a slot.

    place: of each slot in its row; there: whether it is one that can be seen.
    """
    product = tl.dot(queries.to(FACTORS), tl.trans(keys.to(FACTORS)), input_precision="ieee")
    seen = there[None, :] & (place[None, :] <= (length - Q + number)[:, None])
    return tl.where(seen, product * scale, NEVER)


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
    head, number, real = _place(tl.program_id(2), GROUP, Q, HEADS, QUERIES)
    entry = head * Q + number
    queries = _block(query, row * GROUP * Q + entry, real, D, WIDE_D)

    most = tl.full([HEADS * QUERIES], NEVER, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    sums = tl.zeros([HEADS * QUERIES, WIDE_E], tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
        place = first + tl.arange(0, BLOCK)
        slot = start + place
        there = place < length
        if valid is not None:
            there = there & (tl.load(valid + slot, mask=there, other=0) != 0)
        key = _block(keys, slot, there, D, WIDE_D)
        logits = _logits(queries, key, there, number, place, length, scale, Q, FACTORS)
        highest = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(highest > NEVER, highest, 0.0)
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(most - base)
        value = _block(values, slot, there, E, WIDE_E)
        rounded = weights.to(value.dtype).to(FACTORS)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums += tl.dot(rounded, value.to(FACTORS), input_precision="ieee")
        most = highest

    any_seen = total > 0.0
    total = tl.where(any_seen, total, 1.0)
    lse = tl.where(any_seen, most + tl.log(total), NEVER)
    target = (row * splits + split) * GROUP * Q + entry
    column = tl.arange(0, WIDE_E)
    mask = real[:, None] & (column < E)[None, :]
    tl.store(parts + target[:, None] * E + column[None, :], sums / total[:, None], mask=mask)
    tl.store(part_lse + target, lse, mask=real)


@triton.jit(do_not_specialize=["splits"])
def merge(
    parts,
    part_lse,
    lengths,
    out,
    lse,
    splits,
    E: tl.constexpr,
    WIDE_E: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The splits of one query of one row, by their log-sum-exp; zeros where none saw a slot."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1)
    entries = tl.num_programs(1)
    length = tl.load(lengths + row).to(tl.int32)
    column = tl.arange(0, WIDE_E)
    most = tl.full([1], NEVER, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([WIDE_E], tl.float32)
    for split in range(0, tl.minimum(tl.cdiv(length, SPLIT), splits)):
        source = (row * splits + split) * entries + entry
        one = tl.load(part_lse + source + tl.arange(0, 1))
        highest = tl.maximum(most, one)
        base = tl.where(highest > NEVER, highest, 0.0)
        shrink = tl.exp(most - base)
        weight = tl.exp(one - base)
        part = tl.load(parts + source * E + column, mask=column < E, other=0.0)
        total = total * shrink + weight
        sums = sums * shrink + part * weight
        most = highest
    any_seen = total > 0.0
    total = tl.where(any_seen, total, 1.0)
    target = row * entries + entry
    merged = (sums / total).to(out.dtype.element_ty)
    tl.store(out + target * E + column, merged, mask=column < E)
    merged_lse = tl.where(any_seen, most + tl.log(total), NEVER)
    tl.store(lse + target + tl.arange(0, 1), merged_lse)


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
    key = _block(keys, slot, there, D, WIDE_D)
    folded = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        head, number, real = _place(tile, GROUP, Q, HEADS, QUERIES)
        source = row * GROUP * Q + head * Q + number
        queries = _block(query, source, real, D, WIDE_D)
        logits = _logits(queries, key, there, number, place, length, scale, Q, FACTORS)
        whole = tl.load(lse + source, mask=real, other=NEVER)
        seeing = whole > NEVER
        weights = tl.exp(logits - tl.where(seeing, whole, 0.0)[:, None])
        weights = tl.where(seeing[:, None], weights, 0.0)
        if columns is not None:
            power = weights * weights if SQUARE else weights
            age = tl.maximum(Q - 1 - number, 0)  # rows of the tile beyond the queries count nothing
            power = power * tl.exp(log_decay * age)[:, None]
            votes = tl.sum(tl.reshape(power, [HEADS, QUERIES, BLOCK]), 1)
            if FOLD:
                folded += tl.sum(votes, 0)
            else:
                voter = tile * HEADS + tl.arange(0, HEADS).to(tl.int64)
                mask = (voter < GROUP)[:, None] & held[None, :]
                tl.store(columns + voter[:, None] * slots + slot[None, :], votes, mask=mask)
        if rows is not None:
            wanted = real & (number >= Q - LAST)
            target = head.to(tl.int64) * LAST + number - (Q - LAST)
            mask = wanted[:, None] & held[None, :]
            tl.store(rows + target[:, None] * slots + slot[None, :], weights, mask=mask)
    if columns is not None and FOLD:
        tl.store(columns + slot, folded, mask=held)
