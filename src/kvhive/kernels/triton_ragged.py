"""Decoding over ragged rows with Triton: few queries a row, rows of any lengths in one launch.

Experimental: its numbers are tested in Triton's interpreter alone. It compiles for GPUs but has
never run on one, and sizes of tiles are guesses.

Rows are cut into splits of SPLIT slots that run at once and are merged by their log-sum-exp
(Flash-Decoding, Dao et al. 2023), so that one long row keeps a whole GPU busy. The query heads that
share a KV head are one tile, as long as there are no more than 32 queries in all: each slot is read
once for all of them.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from kvhive.kernels.contracts import Needs
from kvhive.kernels.ragged import Extents, Seen
from kvhive.kernels.triton_tiles import DTYPES, SPLIT, WIDEST, Tile, block, wide

INDICES = (torch.int32, torch.int64)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, extents: Extents, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ragged_reference.attend`, for at most 16 queries a row; lse is float32.

    query `[b, H, q, d]`; keys `[S, d]` and values `[S, e]`, contiguous; all float16, bfloat16 or
    float32; d and e at most 256. Logits and sums are float32; probabilities are rounded to the
    values' dtype before they meet them. Raises ImportError without Triton, ValueError for tensors
    of other kinds.
    """
    tile = _tile(query, keys, extents)
    _check_values(values, keys)
    programs, width = _programs(), values.shape[1]
    sizes = {"E": width, "WIDE_E": wide(width), "SPLIT": SPLIT}
    places, splits = _places(extents), -(-extents.longest // SPLIT)
    parts = query.new_empty(tile.rows, splits, tile.group * tile.q, width, dtype=torch.float32)
    part_lse = parts.new_empty(parts.shape[:3])
    out = query.new_empty(*query.shape[:3], width)
    lse = parts.new_empty(query.shape[:3])
    with torch.cuda.device_of(query):
        if splits:
            programs.attend[(tile.rows, splits, tile.tiles)](
                query.contiguous(),
                keys,
                values,
                *places,
                parts,
                part_lse,
                scale,
                splits,
                **tile.sizes,
                FACTORS=programs.factors(keys.dtype),
                **sizes,
                BLOCK=block(max(tile.width, width), keys.dtype),
            )
        programs.merge[(tile.rows, tile.group * tile.q)](
            parts,
            part_lse,
            places[1],
            out,
            lse,
            splits,
            **sizes,
        )
    return out, lse


def report(
    query: Tensor, keys: Tensor, extents: Extents, lse: Tensor, scale: float, needs: Needs
) -> Seen:
    """As `ragged_reference.report`: one more pass over the keys, `lse` being that of `attend`."""
    tile = _tile(query, keys, extents)
    if not needs.attention:
        return Seen()
    programs, last = _programs(), min(needs.last_rows, tile.q)
    shape = (len(keys),) if needs.fold else (tile.group, len(keys))
    columns = keys.new_zeros(shape, dtype=torch.float32) if needs.columns else None
    rows = keys.new_zeros(tile.group, last, len(keys), dtype=torch.float32) if last else None
    size = block(tile.width, keys.dtype)
    blocks, places = -(-extents.longest // size), _places(extents)
    if blocks:
        with torch.cuda.device_of(query):
            programs.report[(tile.rows, blocks)](
                query.contiguous(),
                keys,
                *places,
                lse.float().contiguous(),
                columns,
                rows,
                scale,
                math.log(needs.decay) if needs.decay else -1e9,
                len(keys),
                **tile.sizes,
                FACTORS=programs.factors(keys.dtype),
                BLOCK=size,
                TILES=tile.tiles,
                SQUARE=needs.columns == "square",
                FOLD=needs.fold,
                LAST=last,
            )
    return Seen(columns, rows)


def _places(extents: Extents) -> tuple[Tensor, Tensor, Tensor | None]:
    """Starts, lengths and valid slots, without gaps."""
    valid = None if extents.valid is None else extents.valid.contiguous()
    return extents.starts.contiguous(), extents.lengths.contiguous(), valid


def _programs() -> ModuleType:
    """The programs, which load Triton."""
    try:
        from kvhive.kernels import triton_programs
    except ImportError as error:
        raise ImportError("Triton is missing; install the package triton") from error
    return triton_programs


def _tile(query: Tensor, keys: Tensor, extents: Extents) -> Tile:
    """For tensors that fit each other and the kernels."""
    width = query.shape[3]
    if keys.dtype not in DTYPES or query.dtype != keys.dtype:
        raise ValueError(
            "queries and keys: expected one dtype of float16, bfloat16 and float32, "
            f"got {query.dtype} and {keys.dtype}"
        )
    if keys.ndim != 2 or keys.shape[1] != width or not keys.is_contiguous():
        raise ValueError(
            f"keys: expected [S, {width}] without gaps, got {list(keys.shape)}, "
            f"strides {list(keys.stride())}"
        )
    if width > WIDEST:
        raise ValueError(f"keys: expected heads of at most {WIDEST} numbers, got {width}")
    tile = Tile.of(query, len(extents.starts))
    _check_extents(extents, len(keys))
    return tile


def _check_extents(extents: Extents, slots: int) -> None:
    starts, lengths, valid = extents.starts, extents.lengths, extents.valid
    if starts.dtype not in INDICES or lengths.dtype not in INDICES:
        raise ValueError(
            f"starts and lengths: expected int32 or int64, got {starts.dtype} and {lengths.dtype}"
        )
    if lengths.shape != starts.shape:
        raise ValueError(f"lengths: expected {len(starts)}, one a row, got {list(lengths.shape)}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (slots,)):
        raise ValueError(
            f"valid: expected torch.bool [{slots}], got {valid.dtype} {list(valid.shape)}"
        )


def _check_values(values: Tensor, keys: Tensor) -> None:
    fits = values.ndim == 2 and len(values) == len(keys) and values.dtype == keys.dtype
    if not fits or not values.is_contiguous():
        raise ValueError(
            f"values: expected {keys.dtype} [{len(keys)}, e] without gaps, as the keys are, "
            f"got {values.dtype} {list(values.shape)}, strides {list(values.stride())}"
        )
    if values.shape[1] > WIDEST:
        raise ValueError(f"values: expected heads of at most {WIDEST}, got {values.shape[1]}")
