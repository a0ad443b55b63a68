"""Pages of vLLM's CPU kernels, which pack keys and values as the machine's instructions like it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvhive_vllm.pages import Pages, Writer, tokens_of, whole_pages


class Packing(ABC):
    """How the numbers of `size` tokens of one head lie in a tile."""

    @abstractmethod
    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """`[..., size * d]` -> `[..., size, d]`."""

    @abstractmethod
    def pack(self, rows: Tensor) -> Tensor:
        """`[..., size, d]` -> `[..., size * d]`."""

    def fits(self, tiles: Tensor, size: int, width: int) -> bool:
        """Whether tiles of such numbers can be packed so, of `size` tokens `width` wide."""
        return True

    def places(self, size: int, width: int) -> Tensor:
        """int64 `[size, d]`: where in a tile, of 65,536 numbers at most, those of a token lie."""
        numbers = torch.arange(size * width).to(torch.int16)
        return self.unpack(numbers, size).long() & 0xFFFF


class Rows(Packing):
    """Token after token."""

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """As they are."""
        return tiles.unflatten(-1, (size, -1))

    def pack(self, rows: Tensor) -> Tensor:
        """As they are."""
        return rows.flatten(-2)


class Columns(Packing):
    """Channel after channel."""

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """Transposed."""
        return tiles.unflatten(-1, (-1, size)).transpose(-1, -2)

    def pack(self, rows: Tensor) -> Tensor:
        """Transposed."""
        return rows.transpose(-1, -2).flatten(-2)


class ChannelPairs(Packing):
    """Pairs of channels of 16 tokens after one another: keys for matrix instructions on 16 bits."""

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """Pairs are moved as one number of 32 bits."""
        pairs = tiles.view(torch.int32).unflatten(-1, (size // 16, -1, 16))
        return pairs.transpose(-1, -2).flatten(-3, -2).contiguous().view(tiles.dtype)

    def pack(self, rows: Tensor) -> Tensor:
        """The other way round."""
        pairs = rows.contiguous().view(torch.int32).unflatten(-2, (-1, 16))
        return pairs.transpose(-1, -2).flatten(-3).contiguous().view(rows.dtype)

    def fits(self, tiles: Tensor, size: int, width: int) -> bool:
        """Whole groups and pairs of 16 bits."""
        return tiles.itemsize == 2 and size % 16 == 0 and width % 2 == 0


class TokenPairs(Packing):
    """Pairs of tokens of 16 channels after one another: values for the same instructions, on 16
    bits too. A pair is moved as one number of 32 bits, the first of its tokens in the lower half.
    """

    def unpack(self, tiles: Tensor, size: int) -> Tensor:
        """`[16 channels, pairs of tokens, channel]` -> pairs, channels -> tokens, channels."""
        parts = tiles.view(torch.int32).unflatten(-1, (-1, size // 2, 16))
        pairs = parts.transpose(-2, -3).flatten(-2)
        first, second = pairs.to(torch.int16), (pairs >> 16).to(torch.int16)
        return torch.stack([first, second], -2).flatten(-3, -2).view(tiles.dtype)

    def pack(self, rows: Tensor) -> Tensor:
        """The other way round."""
        tokens = rows.contiguous().view(torch.int16).unflatten(-2, (-1, 2))
        first, second = tokens.to(torch.int32).unbind(-2)
        pairs = (first & 0xFFFF) | (second << 16)
        parts = pairs.unflatten(-1, (-1, 16)).transpose(-2, -3)
        return parts.flatten(-3).contiguous().view(rows.dtype)

    def fits(self, tiles: Tensor, size: int, width: int) -> bool:
        """Whole pairs and groups of 16 bits."""
        return tiles.itemsize == 2 and size % 2 == 0 and width % 16 == 0


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
        self._pages = cache.view(pages, -1)
        self._keys, self._values = self._packings(write)
        places = [self._keys.places(size, self.width), self._values.places(size, self.width)]
        places[1] += size * self.width
        self._places = torch.cat(places, -1)  # [size, 2 * d], of a slot in its two tiles

    def keys(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.keys`."""
        return self._read(0, self._keys, blocks, tokens)

    def values(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.values`."""
        return self._read(1, self._values, blocks, tokens)

    def both(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """As `Pages.both`; whole pages are fetched, in one go."""
        pages = self._pages.index_select(0, self.pages(blocks, tokens))
        tiles = pages.view(-1, *self._tiles.shape[1:]).unbind(2)
        keys, values = (
            tokens_of(packing.unpack(tile.contiguous(), self.size), tokens)
            for packing, tile in zip((self._keys, self._values), tiles, strict=True)
        )
        return keys, values

    def write(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """As `Pages.write`."""
        pages = self.pages(blocks, keys.shape[1])
        for side, packing, rows in ((0, self._keys, keys), (1, self._values, values)):
            self._tiles[pages, :, side] = packing.pack(whole_pages(rows, self.size))

    def move(self, blocks: Tensor, heads: Tensor, source: Tensor, target: Tensor) -> None:
        """As `Pages.move`."""
        numbers = self._pages[self._numbers(blocks, heads, source)]
        self._pages[self._numbers(blocks, heads, target)] = numbers

    def _numbers(self, blocks: Tensor, heads: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where in their pages the keys and values of slots lie: int64 `[n, 1]`, `[n, 2 * d]`."""
        page, row = self.rows(blocks, slots)
        start = heads * (2 * self.size * self.width)
        return page[:, None], start[:, None] + self._places[row]

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
            if not packing.fits(tiles, self.size, self.width):
                continue
            unpacked = packing.unpack(tiles, self.size)
            if torch.equal(unpacked, wanted) and torch.equal(packing.pack(unpacked), tiles):
                return packing
        raise ValueError(
            f"vLLM's kernels for this CPU pack pages of {self.size} tokens of {self.width} numbers "
            "in a way that kvhive-vllm does not know; please report the machine"
        )
