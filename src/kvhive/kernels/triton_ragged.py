"""Decoding over ragged rows with Triton: few queries a row, rows of any lengths in one launch.

Experimental: its numbers are tested in Triton's interpreter alone. It compiles for GPUs but has
never run on one, and sizes of tiles are guesses.

Rows are cut into splits of SPLIT slots that run at once and are merged by their log-sum-exp
(Flash-Decoding, Dao et al. 2023), so that one long row keeps a whole GPU busy. The query heads that
share a KV head are one tile, as long as there are no more than 32 queries in all: each slot is read
once for all of them.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvhive.kernels.contracts import Needs
from kvhive.kernels.ragged import Extents, Seen

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
WIDEST = 256  # head size
MOST = 16  # queries a row
SPLIT = 256  # slots of one program
LEAST = 16  # what a matrix product takes at least, in every direction
TALLEST = 32  # queries of one tile
LONGEST, LARGEST = 64, 1 << 14  # slots of one tile, and its bytes: for 99 KB of shared memory


@cache
def available() -> bool:
    """Whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor, keys: Tensor, values: Tensor, extents: Extents, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ragged_reference.attend`, for at most 16 queries a row; lse is float32.

    query `[b, H, q, d]`; keys `[S, d]` and values `[S, e]`, contiguous; all float16, bfloat16 or
    float32; d and e at most 256. Logits and sums are float32; probabilities are rounded to the
    values' dtype before they meet them. Raises ImportError without Triton, ValueError for tensors
    of other kinds.
    """
    tile = _Tile.of(query, keys, extents)
    _check_values(values, keys)
    programs, width = _programs(), values.shape[1]
    sizes = {"E": width, "WIDE_E": _wide(width), "SPLIT": SPLIT}
    places, splits = _places(extents), -(-extents.longest // SPLIT)
    parts = query.new_empty(tile.rows, splits, tile.group * tile.q, width, dtype=torch.float32)
    part_lse = parts.new_empty(parts.shape[:3])
    out = query.new_empty(*query.shape[:3], width)
    lse = parts.new_empty(query.shape[:3])
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
            **tile.sizes(programs),
            **sizes,
            BLOCK=_block(max(tile.width, width), keys.dtype),
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
    tile = _Tile.of(query, keys, extents)
    if not needs.attention:
        return Seen()
    programs, last = _programs(), min(needs.last_rows, tile.q)
    shape = (len(keys),) if needs.fold else (tile.group, len(keys))
    columns = keys.new_zeros(shape, dtype=torch.float32) if needs.columns else None
    rows = keys.new_zeros(tile.group, last, len(keys), dtype=torch.float32) if last else None
    block = _block(tile.width, keys.dtype)
    blocks, places = -(-extents.longest // block), _places(extents)
    if blocks:
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
            **tile.sizes(programs),
            BLOCK=block,
            TILES=tile.tiles,
            SQUARE=needs.columns == "square",
            FOLD=needs.fold,
            LAST=last,
        )
    return Seen(columns, rows)


@dataclass(frozen=True)
class _Tile:
    """How the queries of one KV head are laid in tiles of `heads` query heads x `queries` queries,
    both powers of two.
    """

    rows: int
    group: int
    q: int
    width: int
    dtype: torch.dtype
    heads: int
    queries: int

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, extents: Extents) -> _Tile:
        """For tensors that fit each other and the kernels."""
        _check(query, keys, extents)
        rows, (batch, heads, q, width) = len(extents.starts), query.shape
        group, queries = batch * heads // rows, _power(q)
        together = min(_power(group), max(1, TALLEST // queries))
        together = max(together, LEAST // queries)
        return cls(rows, group, q, width, keys.dtype, together, queries)

    @property
    def tiles(self) -> int:
        """Tiles that hold the whole group."""
        return -(-self.group // self.heads)

    def sizes(self, programs: ModuleType) -> dict[str, object]:
        """What the programs must know when they are compiled."""
        return {
            "GROUP": self.group,
            "Q": self.q,
            "D": self.width,
            "WIDE_D": _wide(self.width),
            "HEADS": self.heads,
            "QUERIES": self.queries,
            "FACTORS": programs.factors(self.dtype),
        }


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _wide(width: int) -> int:
    """What a head of so many numbers is padded to."""
    return max(LEAST, _power(width))


def _block(width: int, dtype: torch.dtype) -> int:
    """Slots of one tile: a power of two that divides SPLIT."""
    return max(LEAST, min(LONGEST, LARGEST // (_wide(width) * dtype.itemsize)))


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


def _check(query: Tensor, keys: Tensor, extents: Extents) -> None:
    rows, (batch, heads, q, width) = len(extents.starts), query.shape
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
    if not 1 <= q <= MOST:
        raise ValueError(f"queries: expected 1 to {MOST} a row, got {q}")
    if not rows or rows % batch or batch * heads % rows:
        raise ValueError(
            f"starts: expected one for each KV head of {batch} x {heads} query heads, got {rows}"
        )
    _check_extents(extents, len(keys))


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
