"""How Triton's kernels for decoding cut their work: sizes, and tiles of queries."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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


@dataclass(frozen=True)
class Tile:
    """How the queries of one KV head are laid in tiles of `heads` query heads x `queries` queries,
    both powers of two.
    """

    rows: int
    group: int
    q: int
    width: int
    heads: int
    queries: int

    @classmethod
    def of(cls, query: Tensor, rows: int) -> Tile:
        """For queries `[b, H, q, d]` of so many KV heads. Raises ValueError for other than 1 to 16
        queries, and rows that no number of KV heads gives.
        """
        batch, heads, q, width = query.shape
        if not 1 <= q <= MOST:
            raise ValueError(f"queries: expected 1 to {MOST} a row, got {q}")
        if not rows or rows % batch or batch * heads % rows:
            raise ValueError(
                f"starts: expected one for each KV head of {batch} x {heads} query heads, "
                f"got {rows}"
            )
        group, queries = batch * heads // rows, power(q)
        together = min(power(group), max(1, TALLEST // queries))
        together = max(together, LEAST // queries)
        return cls(rows, group, q, width, together, queries)

    @property
    def tiles(self) -> int:
        """Tiles that hold the whole group."""
        return -(-self.group // self.heads)

    @property
    def sizes(self) -> dict[str, int]:
        """What the programs must know when they are compiled."""
        return {
            "GROUP": self.group,
            "Q": self.q,
            "D": self.width,
            "WIDE_D": wide(self.width),
            "HEADS": self.heads,
            "QUERIES": self.queries,
        }


def power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def wide(width: int) -> int:
    """What a head of so many numbers is padded to."""
    return max(LEAST, power(width))


def block(width: int, dtype: torch.dtype) -> int:
    """Slots of one tile: a power of two that divides SPLIT."""
    return max(LEAST, min(LONGEST, LARGEST // (wide(width) * dtype.itemsize)))
