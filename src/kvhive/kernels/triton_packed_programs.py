"""Triton programs for rows in several forms; `triton_packed` launches them and says what they are
for.

What they know of a row lies in `table`, int64 `[2 + 10 * segments, R]`: where the row ends, tokens
of its longest segment, and for each segment its tokens, the place of the first, and four numbers
for its keys and four for its values: slot of the first token, its place in its form's row, the
row's first run, and the end of its runs.

A form is a tuple of its numbers, grids and ends of runs: `(numbers,)` exact, `(codes,
grids)` in bits with a grid a token, `(codes, grids, ends)` with one a run. FORMS has for each
segment bits and group of its keys, and of its values; exact tokens have 0 bits.
"""

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

ROW = tl.constexpr(2)  # numbers that the table has of a row
SEGMENT, SIDE = tl.constexpr(10), tl.constexpr(4)  # and of a segment, and of its keys or values
HEAD = tl.constexpr(2)  # of which so many come before those of its keys


@triton.jit
def _plane(
    codes, mask, FIRST: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr
):
    """int32 `[slots, WIDE]`: the bits of one plane, as `bits.packed` lays them."""
    SIZE: tl.constexpr = W * BITS // 8
    column = tl.arange(0, WIDE)
    byte = tl.load(codes + FIRST + (column % SIZE)[None, :], mask=mask, other=0).to(tl.int32)
    return (byte >> (column // SIZE * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def _codes(codes, slot, mask, BITS: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """int32 `[slots, WIDE]`: the codes of a token, out of its planes."""
    first = codes + slot[:, None] * (W * BITS // 8)
    if BITS == 3:
        low = _plane(first, mask, 0, 2, W, WIDE)
        number = low | (_plane(first, mask, W // 4, 1, W, WIDE) << 2)
    else:
        number = _plane(first, mask, 0, BITS, W, WIDE)
    return number


@triton.jit
def _run(ends, first, last, place, there, steps):
    """The run of each token: the first of runs first..last-1 that ends behind its place."""
    low = tl.zeros_like(place).to(tl.int64) + first
    high = tl.zeros_like(low) + last
    for _ in range(steps):
        open = there & (low < high)
        middle = (low + high) // 2
        behind = tl.load(ends + middle, mask=open, other=0) > place
        high = tl.where(open & behind, middle, high)
        low = tl.where(open & (behind == 0), middle + 1, low)
    return low


@triton.jit
def _tokens(
    form,
    side,
    rows,
    place,
    there,
    steps,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """`[slots, WIDE]` in FACTORS: tokens at `place` in their segment; zeros where nothing is.

    side: what the table has of the segment's keys or values.
    """
    slot = tl.load(side) + place
    if BITS == 0:
        numbers = load_block(form[0], slot, there, W, WIDE)
    else:
        owner = slot
        if len(form) == 3:
            first, last = tl.load(side + 2 * rows), tl.load(side + 3 * rows)
            owner = _run(form[2], first, last, tl.load(side + rows) + place, there, steps)
        column = tl.arange(0, WIDE)
        mask = there[:, None] & (column < W)[None, :]
        grid = form[1] + owner[:, None] * (2 * (W // GROUP)) + (column // GROUP)[None, :]
        scale = tl.load(grid, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(grid + W // GROUP, mask=mask, other=0.0).to(tl.float32)
        numbers = _codes(form[0], slot, mask, BITS, W, WIDE).to(tl.float32) * scale + zero
    return numbers.to(FACTORS)


@triton.jit(do_not_specialize=["splits", "steps"])
def attend(
    query,
    segments,
    table,
    parts,
    part_lse,
    scale,
    splits,
    steps,
    FORMS: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    """The same split of every segment of one row for one tile of its queries: `parts` `[R, splits,
    GROUP * Q, E]`, normalised within the split, and `part_lse` `[R, splits, GROUP * Q]`. Splits
    beyond the longest segment of the row are left unwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    split = tl.program_id(1)
    if split * SPLIT >= tl.load(table + rows + row):
        return
    end = tl.load(table + row)
    head, number, real = entries(tl.program_id(2), GROUP, Q, HEADS, QUERIES)
    entry = head * Q + number
    queries = load_block(query, row * GROUP * Q + entry, real, D, WIDE_D)

    most = tl.full([HEADS * QUERIES], NEVER, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    sums = tl.zeros([HEADS * QUERIES, WIDE_E], tl.float32)
    for one in tl.static_range(len(FORMS)):
        mine = table + (ROW + one * SEGMENT) * rows + row
        keys, values = mine + HEAD * rows, mine + (HEAD + SIDE) * rows
        length, at = tl.load(mine).to(tl.int32), tl.load(mine + rows)
        last = tl.minimum(split * SPLIT + SPLIT, length)
        for first in tl.range(split * SPLIT, last, BLOCK, num_stages=STAGES):
            place = first + tl.arange(0, BLOCK)
            there = place < length
            key = _tokens(
                segments[one][0],
                keys,
                rows,
                place,
                there,
                steps,
                FORMS[one][0],
                FORMS[one][1],
                D,
                WIDE_D,
                FACTORS,
            )
            logits = masked_logits(
                queries, key, there, end - Q + number, at + place, scale, FACTORS
            )
            value = _tokens(
                segments[one][1],
                values,
                rows,
                place,
                there,
                steps,
                FORMS[one][2],
                FORMS[one][3],
                E,
                WIDE_E,
                FACTORS,
            )
            most, total, sums = absorb(logits, value, most, total, sums, FACTORS)
    target = (row * splits + split) * GROUP * Q + entry
    store_part(parts, part_lse, target, real, most, total, sums, E, WIDE_E)


@triton.jit(do_not_specialize=["slots", "steps"])
def report(
    query,
    segments,
    table,
    lse,
    columns,
    received,
    scale,
    log_decay,
    slots,
    steps,
    FORMS: tl.constexpr,
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
    """What the same block of every segment of one row received from all its queries: `columns`
    `[R, slots]` or `[R, GROUP, slots]`, and `received`, single rows of probabilities, `[R, GROUP,
    LAST, slots]`; either may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    first = tl.program_id(1) * BLOCK
    end = tl.load(table + row)
    if columns is not None:
        columns += row * slots * (1 if FOLD else GROUP)
    if received is not None:
        received += row * slots * GROUP * LAST
    for one in tl.static_range(len(FORMS)):
        mine = table + (ROW + one * SEGMENT) * rows + row
        length = tl.load(mine).to(tl.int32)
        if first < length:
            place = first + tl.arange(0, BLOCK)
            there = place < length
            key = _tokens(
                segments[one][0],
                mine + HEAD * rows,
                rows,
                place,
                there,
                steps,
                FORMS[one][0],
                FORMS[one][1],
                D,
                WIDE_D,
                FACTORS,
            )
            slot = tl.load(mine + rows) + place
            votes(
                query,
                key,
                there,
                there,
                slot,
                end,
                lse,
                columns,
                received,
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
