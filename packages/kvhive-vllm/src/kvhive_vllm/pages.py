"""Reading and writing the pages of one layer, in whatever order the engine's kernels pack them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Writer = Callable[[Tensor, Tensor, Tensor], None]  # keys, values [n, K, d], slots int64 [n]


class Pages(ABC):
    """Pages of `size` tokens, for `heads` KV heads, keys `width` and values `value_width` wide.

    block_size: tokens of the blocks that the scheduler deals out, a multiple of `size`; a block is
    so many pages, one after the other.
    """

    def __init__(self, size: int, heads: int, width: int, value_width: int, block_size: int):
        self.size, self.heads = size, heads
        self.width, self.value_width = width, value_width
        self._pages_a_block = block_size // size

    @abstractmethod
    def keys(self, blocks: Tensor, tokens: int) -> Tensor:
        """The keys of the first `tokens` tokens of blocks (int64 `[nb]`), `[K, tokens, d]`."""

    @abstractmethod
    def values(self, blocks: Tensor, tokens: int) -> Tensor:
        """Their values, `[K, tokens, e]`."""

    def both(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys(blocks, tokens), self.values(blocks, tokens)

    @abstractmethod
    def write(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys `[K, n, d]` and values `[K, n, e]` into the first n slots of blocks; what is
        behind them in the last page is of no meaning afterwards.
        """

    @abstractmethod
    def move(self, blocks: Tensor, heads: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy single tokens of single heads to other slots of blocks; heads, source, target:
        int64 `[n]`, and no slot of a head is both.
        """

    def rows(self, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """int64: the page of each slot of blocks, and the slot in that page."""
        pages = self.pages(blocks, len(blocks) * self._pages_a_block * self.size)
        return pages[slots // self.size], slots % self.size

    def pages(self, blocks: Tensor, tokens: int) -> Tensor:
        """int64: the pages of these blocks that hold the first `tokens` tokens."""
        count = -(-tokens // self.size)
        if self._pages_a_block == 1:
            return blocks[:count]
        part = torch.arange(self._pages_a_block, device=blocks.device)
        return (blocks[:, None] * self._pages_a_block + part).flatten()[:count]


def whole_pages(rows: Tensor, size: int) -> Tensor:
    """`[K, n, d]` -> `[pages, K, size, d]`, zeros behind the last token."""
    heads, n, width = rows.shape
    count = -(-n // size)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, count * size - n))
    return padded.view(heads, count, size, width).transpose(0, 1)


def tokens_of(pages: Tensor, tokens: int) -> Tensor:
    """`[pages, K, size, d]` -> `[K, tokens, d]`."""
    return pages.transpose(0, 1).flatten(1, 2)[:, :tokens]
