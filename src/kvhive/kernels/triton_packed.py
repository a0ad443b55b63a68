"""Decoding over rows in several forms with Triton: few queries a row, all segments in one launch,
numbers of few bits unpacked in registers.

Experimental: its numbers are tested in Triton's interpreter alone. It compiles for GPUs but has
never run on one, and sizes of tiles are guesses. It takes Triton 3.4 or later, whose programs take
tuples.

A program works on the same SPLIT tokens of every segment of a row; splits are merged by their
log-sum-exp (Flash-Decoding, Dao et al. 2023), as in `triton_ragged`. So short segments, such as
sinks and the newest tokens, need no programs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from kvhive.kernels import triton_tiles
from kvhive.kernels.contracts import Needs, Observed, Rows
from kvhive.kernels.packed_segments import ExactRows, Form, Segment
from kvhive.kernels.triton_tiles import DTYPES, SPLIT, WIDEST, Tile, block, wide

OLDEST = (3, 4)  # version of Triton
# Tiles loaded ahead, so that numbers, scales and zeros of all fit 99 KB of shared memory.
STAGES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 1}


@cache
def available() -> bool:
    """Whether a Triton is there that is new enough."""
    if not triton_tiles.available():
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST


def attend(query: Tensor, segments: Sequence[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each row's q queries to its tokens, of which the last q are their own and see
    each other causally.

    query `[b, H, q, d]`, q at most 16, float16, bfloat16 or float32, of which head h reads row
    `h // (H // K)` of its batch row; segments of R = b * K rows, d and e at most 256. Exact tokens
    have the query's dtype, and numbers of few bits are rounded to it. Returns the output `[b, H, q,
    e]` in that dtype, zeros where a query sees nothing, and the natural logarithm of the sum of
    exp(logit), float32 `[b, H, q]`, minus infinity there. Logits and sums are float32;
    probabilities are rounded to the query's dtype before they meet the values. Raises ImportError
    without Triton, ValueError for tensors of other kinds.
    """
    tile, width = _tile(query, segments), segments[0].values.width
    programs, given = _programs(), _Arguments.of(segments, query.device)
    splits = -(-given.longest // SPLIT)
    sizes = {"E": width, "WIDE_E": wide(width), "SPLIT": SPLIT}
    parts = query.new_empty(tile.rows, splits, tile.group * tile.q, width, dtype=torch.float32)
    part_lse = parts.new_empty(parts.shape[:3])
    out = query.new_empty(*query.shape[:3], width)
    lse = parts.new_empty(query.shape[:3])
    with torch.cuda.device_of(query):
        if splits:
            programs.attend[(tile.rows, splits, tile.tiles)](
                query.contiguous(),
                given.tensors,
                given.table,
                parts,
                part_lse,
                scale,
                splits,
                given.steps,
                FORMS=given.forms,
                **tile.sizes,
                FACTORS=programs.factors(query.dtype),
                **sizes,
                BLOCK=block(max(tile.width, width), query.dtype),
                STAGES=STAGES[query.dtype],
            )
        programs.merge[(tile.rows, tile.group * tile.q)](
            parts,
            part_lse,
            given.table[1],
            out,
            lse,
            splits,
            **sizes,
        )
    return out, lse


def report(
    query: Tensor, segments: Sequence[Segment], lse: Tensor, scale: float, needs: Needs, length: int
) -> Observed:
    """What the queries gave each token, in one more pass over the keys, `lse` being that of
    `attend`.

    length: places of the report; no row ends behind them. Columns and rows are those of `Observed`
    for n = length, zero at places of no segment; keys are left to the store.
    """
    tile = _tile(query, segments)
    batch, heads, q, _ = query.shape
    last, kept = min(needs.last_rows, q), tile.rows // batch if needs.fold else heads
    zeros = partial(query.new_zeros, dtype=torch.float32)
    columns = zeros(batch, kept, length) if needs.columns else None
    rows = zeros(batch, heads, last, length) if last else None
    if needs.attention:
        programs, given = _programs(), _Arguments.of(segments, query.device)
        size = block(tile.width, query.dtype)
        with torch.cuda.device_of(query):
            programs.report[(tile.rows, max(1, -(-given.longest // size)))](
                query.contiguous(),
                given.tensors,
                given.table,
                lse.float().contiguous(),
                columns,
                rows,
                scale,
                math.log(needs.decay) if needs.decay else -1e9,
                length,
                given.steps,
                FORMS=given.forms,
                **tile.sizes,
                FACTORS=programs.factors(query.dtype),
                BLOCK=size,
                TILES=tile.tiles,
                SQUARE=needs.columns == "square",
                FOLD=needs.fold,
                LAST=last,
            )
    return Observed(
        fresh=q,
        columns=columns,
        rows=None if rows is None else Rows.of(rows),
        queries=query if needs.queries else None,
        scale=scale,
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """Keys or values of a segment, as programs know them.

    tensors, form: see `triton_packed_programs`. places: int64 `[4, R]` on the CPU, what the table
    has of them. runs: of the row that has most.
    """

    tensors: tuple[Tensor, ...]
    form: tuple[int, int]
    places: Tensor
    runs: int = 0

    @classmethod
    def of(cls, rows: Form, first: Tensor) -> _Side:
        """Of each row the tokens from `first` on."""
        none, slot = torch.zeros_like(first), rows.starts + first
        if isinstance(rows, ExactRows):
            return cls((rows.numbers,), (0, 1), torch.stack([slot, first, none, none]))
        form, runs = (rows.bits, rows.group), rows.runs
        if runs is None:
            places = torch.stack([slot, first, none, none])
            return cls((rows.codes, rows.grids), form, places)
        places = torch.stack([slot, first, runs.starts, runs.starts + runs.counts])
        return cls((rows.codes, rows.grids, runs.ends), form, places, int(runs.counts.max()))


@dataclass(frozen=True, eq=False)
class _Arguments:
    """Segments as programs take them.

    tensors, table, forms: see `triton_packed_programs`. longest: tokens of the longest segment of
    any row. steps: of the search for a token's run.
    """

    tensors: tuple[tuple[object, object], ...]
    table: Tensor
    forms: tuple[tuple[int, int, int, int], ...]
    longest: int
    steps: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> _Arguments:
        """The table goes to the device in one piece."""
        sides = [
            (_Side.of(one.keys, one.key_first), _Side.of(one.values, one.value_first))
            for one in segments
        ]
        lengths = torch.stack([one.lengths for one in segments])
        ends = torch.stack([one.at + one.lengths for one in segments])
        table = [torch.where(lengths > 0, ends, 0).amax(0)[None], lengths.amax(0)[None]]
        for one, (key, value) in zip(segments, sides, strict=True):
            table += [one.lengths[None], one.at[None], key.places, value.places]
        return cls(
            tensors=tuple((key.tensors, value.tensors) for key, value in sides),
            table=torch.cat(table).to(device),
            forms=tuple(key.form + value.form for key, value in sides),
            longest=int(lengths.max()),
            steps=max(max(key.runs, value.runs) for key, value in sides).bit_length(),
        )


def _programs() -> ModuleType:
    """The programs, which load Triton."""
    try:
        from kvhive.kernels import triton_packed_programs
    except ImportError as error:
        raise ImportError("Triton is missing; install the package triton") from error
    return triton_packed_programs


def _tile(query: Tensor, segments: Sequence[Segment]) -> Tile:
    """For segments that fit each other, the queries and the kernels."""
    if query.dtype not in DTYPES:
        raise ValueError(f"queries: expected float16, bfloat16 or float32, got {query.dtype}")
    if not segments:
        raise ValueError("segments: expected at least one, got none")
    width = segments[0].values.width
    for one in segments:
        _check("keys", one.keys, query.shape[3], query.dtype)
        _check("values", one.values, width, query.dtype)
        if len(one.lengths) != len(segments[0].lengths):
            raise ValueError(
                f"segments: expected {len(segments[0].lengths)} rows in each, "
                f"got {len(one.lengths)}"
            )
    return Tile.of(query, len(segments[0].lengths))


def _check(name: str, rows: Form, width: int, dtype: torch.dtype) -> None:
    """Refuse what the programs would misread."""
    if rows.width != width or width > WIDEST:
        raise ValueError(
            f"{name}: expected {width} numbers a token, as elsewhere, and at most {WIDEST}, "
            f"got {rows.width}"
        )
    held, kind = (rows.numbers, dtype) if isinstance(rows, ExactRows) else (rows.codes, torch.uint8)
    if held.dtype != kind or not held.is_contiguous():
        raise ValueError(
            f"{name}: expected {kind} without gaps, got {held.dtype}, strides {list(held.stride())}"
        )
