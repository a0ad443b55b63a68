"""Pages of vLLM's CPU kernels, which pack keys and values as the machine's instructions like it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvhive_vllm.pages import Pages, Writer, tokens_of, whole_pages


class Packing(ABC):
    """How the numbers of `size` tokens of one head lie in a tile."""

    name: str

    @abstractmethod
    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """`[..., size * d]` -> `[..., size, d]`."""

    @abstractmethod
    def pack(self, rows: Tensor) -> Tensor:
        """`[..., size, d]` -> `[..., size * d]`."""

    def fits(self, size: int, width: int) -> bool:
        """Whether tiles of this size can be packed so."""
        return True


class Rows(Packing):
    """Token after token."""

    name = "rows"

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """As they are."""
        return tiles.unflatten(-1, (size, -1))

    def pack(self, rows: Tensor) -> Tensor:
        """As they are."""
        return rows.flatten(-2)


class Columns(Packing):
    """Channel after channel."""

    name = "columns"

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """Transposed."""
        return tiles.unflatten(-1, (-1, size)).transpose(-1, -2)

    def pack(self, rows: Tensor) -> Tensor:
        """Transposed."""
        return rows.transpose(-1, -2).flatten(-2)


class ChannelPairs(Packing):
    """Pairs of channels of 16 tokens after one another: keys for matrix instructions on 16 bits."""

    name = "channel pairs"

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """Pairs are moved as one number of 32 bits."""
        pairs = tiles.view(torch.int32).unflatten(-1, (size // 16, -1, 16))
        return pairs.transpose(-1, -2).flatten(-3, -2).contiguous().view(tiles.dtype)

    def pack(self, rows: Tensor) -> Tensor:
        """The other way round."""
        pairs = rows.contiguous().view(torch.int32).unflatten(-2, (-1, 16))
        return pairs.transpose(-1, -2).flatten(-3).contiguous().view(rows.dtype)

    def fits(self, size: int, width: int) -> bool:
        """Whole groups and pairs."""
        return size % 16 == 0 and width % 2 == 0


class TokenPairs(Packing):
    """Pairs of tokens of 16 channels after one another: values for the same instructions."""

    name = "token pairs"

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """`[16 channels, pairs of tokens, channel, token of the pair]` -> tokens, channels."""
        parts = tiles.unflatten(-1, (-1, size // 2, 16, 2))
        return parts.movedim((-3, -1), (-4, -3)).flatten(-4, -3).flatten(-2)

    def pack(self, rows: Tensor) -> Tensor:
        """The other way round."""
        parts = rows.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 16))
        return parts.movedim((-2, -4), (-4, -3)).transpose(-1, -2).flatten(-4)

    def fits(self, size: int, width: int) -> bool:
        """Whole pairs and groups."""
        return size % 2 == 0 and width % 16 == 0


PACKINGS = (Rows(), Columns(), ChannelPairs(), TokenPairs())


class CpuPages(Pages):
    """Of a cache `[pages, K, size, 2 * d]`: a tile of keys, then one of values.

    write: the engine's own writer, which tells how tiles are packed. Raises `ValueError` where that
    is none of the ways known here.
    """

    def __init__(self, cache: Tensor, block_size: int, write: Writer) -> None:
        pages, heads, size, both = cache.shape
        super().__init__(size, heads, both // 2, both // 2, block_size)
        self._tiles = cache.view(pages, heads, 2, size * self.width)
        self._keys, self._values = self._packings(write)

    def keys(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.keys`."""
        return self._read(0, self._keys, blocks, tokens)

    def values(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.values`."""
        return self._read(1, self._values, blocks, tokens)

    def write(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """As `Pages.write`."""
        pages = self.pages(blocks, keys.shape[1])
        for side, packing, rows in ((0, self._keys, keys), (1, self._values, values)):
            self._tiles[pages, :, side] = packing.pack(whole_pages(rows, self.size))

    def _read(self, side: int, packing: Packing, blocks: Tensor, tokens: int) -> Tensor:
        tiles = self._tiles[self.pages(blocks, tokens), :, side]
        return tokens_of(packing.unpack(tiles, self.size), tokens)

    def _packings(self, write: Writer) -> tuple[Packing, Packing]:
        """Written with one page, which is then as it was; of keys, and of values."""
        page, kept = len(self._tiles) - 1, self._tiles[-1].clone()
        shape, dtype = (self.size, self.heads, self.width), self._tiles.dtype
        rows = torch.randint(-99, 100, (2, *shape)).to(dtype)
        slots = torch.arange(self.size) + page * self.size
        write(rows[0], rows[1], slots)
        found = self._tiles[-1].clone()
        self._tiles[-1] = kept
        return self._packing(found[:, 0], rows[0]), self._packing(found[:, 1], rows[1])

    def _packing(self, tiles: Tensor, rows: Tensor) -> Packing:
        """tiles `[K, size * d]`, rows `[size, K, d]`: the same numbers."""
        wanted = rows.transpose(0, 1)
        for packing in PACKINGS:
            if not packing.fits(self.size, self.width):
                continue
            unpacked = packing.unpack(tiles, self.size)
            if torch.equal(unpacked, wanted) and torch.equal(packing.pack(unpacked), tiles):
                return packing
        raise ValueError(
            f"vLLM's kernels for this CPU pack pages of {self.size} tokens of {self.width} numbers "
            "in a way that kvhive-vllm does not know; please report the machine"
        )
