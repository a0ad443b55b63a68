"""What Triton's programs for decoding have in common.

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
    return FACTORS[dtype] if isinstance(merge, triton.JITFunction) else tl.float32


@triton.jit
def entries(tile, GROUP: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """Of each query of a tile: its head within the group, its number, and whether it is there."""
    entry = tl.arange(0, HEADS * QUERIES)
    head = tile * HEADS + entry // QUERIES
    number = entry % QUERIES
    return head, number, (head < GROUP) & (number < Q)


@triton.jit
def load_block(flat, slot, there, W: tl.constexpr, WIDE: tl.constexpr):
    """`[slots, WIDE]` of flat `[S, W]`, zeros where nothing is."""
    return load_rows(flat, slot * W, there, W, WIDE)


@triton.jit
def load_rows(flat, start, there, W: tl.constexpr, WIDE: tl.constexpr):
    """`[rows, WIDE]`: the W numbers from each start on, zeros where nothing is."""
    column = tl.arange(0, WIDE)
    mask = there[:, None] & (column < W)[None, :]
    return tl.load(flat + start[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def masked_logits(queries, keys, there, last, place, scale, FACTORS: tl.constexpr):
    """`[queries, slots]`, minus infinity where a query does not see a slot.

    place: of each slot in its row; there: whether it is one that can be seen; last: the last place
    that each query sees.
    """
    product = tl.dot(queries.to(FACTORS), tl.trans(keys.to(FACTORS)), input_precision="ieee")
    seen = there[None, :] & (place[None, :] <= last[:, None])
    return tl.where(seen, product * scale, NEVER)


@triton.jit
def weigh(logits, most, total):
    """The largest logit so far and the sum of exp(logit - largest), with those of one more tile;
    and the tile's weights, and what weights summed before shrink by.
    """
    highest = tl.maximum(most, tl.max(logits, 1))
    base = tl.where(highest > NEVER, highest, 0.0)
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(most - base)
    return highest, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def log_sum(most, total):
    """The log-sum-exp, minus infinity where nothing was seen."""
    return tl.where(total > 0.0, most + tl.log(tl.where(total > 0.0, total, 1.0)), NEVER)


@triton.jit
def absorb(logits, value, most, total, sums, FACTORS: tl.constexpr):
    """As `weigh`, with the sum of the values so weighed, `value` `[slots, WIDE_E]`."""
    highest, total, weights, shrink = weigh(logits, most, total)
    rounded = weights.to(value.dtype).to(FACTORS)
    sums = sums * shrink[:, None]
    sums += tl.dot(rounded, value.to(FACTORS), input_precision="ieee")
    return highest, total, sums


@triton.jit
def store_part(
    parts, part_lse, target, real, most, total, sums, E: tl.constexpr, WIDE_E: tl.constexpr
):
    """Write what a split found: `parts` normalised within it, and `part_lse`."""
    lse = log_sum(most, total)
    total = tl.where(total > 0.0, total, 1.0)
    column = tl.arange(0, WIDE_E)
    mask = real[:, None] & (column < E)[None, :]
    tl.store(parts + target[:, None] * E + column[None, :], sums / total[:, None], mask=mask)
    tl.store(part_lse + target, lse, mask=real)


@triton.jit
def votes(
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
    """What a tile of keys `[BLOCK, WIDE_D]` received from all queries of its row, written at `slot`
    of `columns` `[slots]` or `[GROUP, slots]` and of `rows` `[GROUP, LAST, slots]`.
    """
    folded = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        head, number, real = entries(tile, GROUP, Q, HEADS, QUERIES)
        source = row * GROUP * Q + head * Q + number
        queries = load_block(query, source, real, D, WIDE_D)
        logits = masked_logits(queries, key, there, length - Q + number, place, scale, FACTORS)
        whole = tl.load(lse + source, mask=real, other=NEVER)
        seeing = whole > NEVER
        weights = tl.exp(logits - tl.where(seeing, whole, 0.0)[:, None])
        weights = tl.where(seeing[:, None], weights, 0.0)
        if columns is not None:
            power = weights * weights if SQUARE else weights
            power = power * tl.exp(log_decay * tl.maximum(Q - 1 - number, 0))[:, None]
            received = tl.sum(tl.reshape(power, [HEADS, QUERIES, BLOCK]), 1)
            if FOLD:
                folded += tl.sum(received, 0)
            else:
                voter = tile * HEADS + tl.arange(0, HEADS).to(tl.int64)
                mask = (voter < GROUP)[:, None] & held[None, :]
                tl.store(columns + voter[:, None] * slots + slot[None, :], received, mask=mask)
        if rows is not None:
            wanted = real & (number >= Q - LAST)
            target = head.to(tl.int64) * LAST + number - (Q - LAST)
            mask = wanted[:, None] & held[None, :]
            tl.store(rows + target[:, None] * slots + slot[None, :], weights, mask=mask)
    if columns is not None and FOLD:
        tl.store(columns + slot, folded, mask=held)


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
    target = row * entries + entry
    tl.store(lse + target + tl.arange(0, 1), log_sum(most, total))
    merged = (sums / tl.where(total > 0.0, total, 1.0)).to(out.dtype.element_ty)
    tl.store(out + target * E + column, merged, mask=column < E)
