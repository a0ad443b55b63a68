"""Pages of vLLM's kernels for GPUs, which all keep a head's key beside its value."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive_vllm.pages import Pages, Writer, tokens_of, whole_pages


class GpuPages(Pages):
    """Of a cache `[pages, K, size, width + value_width]` with any strides: whether heads or tokens
    come first in memory, and where other layers lie, is a matter of those alone.

    write: the engine's own writer, which must put tokens where they are looked for here. Raises
    `ValueError` where it does not.
    """

    def __init__(self, cache: Tensor, width: int, block_size: int, write: Writer) -> None:
        _, heads, size, both = cache.shape
        super().__init__(size, heads, width, both - width, block_size)
        self._cache = cache
        self._keys, self._values = cache[..., :width], cache[..., width:]
        self._check(write)

    def keys(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.keys`."""
        return tokens_of(self._keys[self.pages(blocks, tokens)], tokens)

    def values(self, blocks: Tensor, tokens: int) -> Tensor:
        """As `Pages.values`."""
        return tokens_of(self._values[self.pages(blocks, tokens)], tokens)

    def write(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """As `Pages.write`."""
        pages = self.pages(blocks, keys.shape[1])
        self._keys[pages] = whole_pages(keys, self.size)
        self._values[pages] = whole_pages(values, self.size)

    def move(self, blocks: Tensor, heads: Tensor, source: Tensor, target: Tensor) -> None:
        """As `Pages.move`."""
        page, row = self.rows(blocks, source)
        tokens = self._cache[page, heads, row]
        page, row = self.rows(blocks, target)
        self._cache[page, heads, row] = tokens

    def _check(self, write: Writer) -> None:
        """One page is written and read, and is then as it was."""
        cache = self._cache
        page, kept = len(cache) - 1, cache[-1].clone()
        shape = (self.size, self.heads, cache.shape[-1])
        rows = torch.randint(-99, 100, shape, device=cache.device).to(cache.dtype)
        slots = torch.arange(self.size, device=cache.device) + page * self.size
        keys, values = rows.split((self.width, self.value_width), -1)
        write(keys.contiguous(), values.contiguous(), slots)
        found = cache[-1].clone()
        cache[-1] = kept
        if not torch.equal(found, rows.transpose(0, 1)):
            raise ValueError(
                f"vLLM's kernels lay pages of {self.size} tokens of {self.heads} heads out in a "
                "way that kvhive-vllm does not know; please report the attention backend"
            )
