"""Pages of the kernels for GPUs, in all layouts that vLLM allocates, on tensors of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvhive_vllm.gpu_pages import GpuPages
from kvhive_vllm.pages import Writer

BLOCKS, HEADS, WIDTH, LAYERS = 7, 3, 8, 2


def views(layout: KVCacheLayout, block: int, kernel: int, dtype: torch.dtype) -> list[Tensor]:
    """What vLLM binds to two layers: blocks of `block` tokens, dealt out in pages of `kernel`."""
    spec = FullAttentionSpec(block_size=block, num_kv_heads=HEADS, head_size=WIDTH, dtype=dtype)
    layer, stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = LAYERS * BLOCKS * spec.page_size_bytes
    place = KVCacheTensor(size, [str(one) for one in range(LAYERS)], layer, stride)
    raw = torch.zeros(size, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, BLOCKS, layout, place, kernel)


def writer(cache: Tensor) -> Writer:
    """The documented layout, token by token: a head's key, and its value behind it."""

    def write(keys: Tensor, values: Tensor, slots: Tensor) -> None:
        size = cache.shape[2]
        for token, slot in enumerate(slots.tolist()):
            for head in range(keys.shape[1]):
                own = cache[slot // size, head, slot % size]
                own[: keys.shape[2]] = keys[token, head]
                own[keys.shape[2] :] = values[token, head]

    return write


def slots_of(blocks: Tensor, block: int, tokens: int) -> Tensor:
    """vLLM's slot mapping of the first tokens of these blocks."""
    place = torch.arange(tokens)
    return blocks[place // block] * block + place % block


# vLLM splits blocks into pages where nothing of other layers or heads lies between these.
SPLIT = [one for one in KVCacheLayout if one.is_layer_compact and one.is_block_compact]
CASES = [(layout, 16, 16) for layout in KVCacheLayout]
CASES += [(layout, block, 16) for layout in SPLIT for block in (32, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "block", "kernel"), CASES)
def test_what_the_engine_writes_is_read_and_the_other_way_round(
    layout: KVCacheLayout, block: int, kernel: int, dtype: torch.dtype
) -> None:
    caches = views(layout, block, kernel, dtype)
    assert caches[0].shape == (BLOCKS * block // kernel, HEADS, kernel, 2 * WIDTH)
    first, other = (GpuPages(cache, WIDTH, block, writer(cache)) for cache in caches)
    assert not any(cache.any() for cache in caches)  # the check left no trace
    blocks, tokens = torch.tensor([5, 2, 6]), 2 * block + 3
    keys, values = torch.randn(2, tokens, HEADS, WIDTH).to(dtype)

    writer(caches[0])(keys, values, slots_of(blocks, block, tokens))
    assert torch.equal(first.keys(blocks, tokens), keys.transpose(0, 1))
    assert torch.equal(first.values(blocks, tokens), values.transpose(0, 1))
    assert torch.equal(first.keys(blocks, 5), keys[:5].transpose(0, 1))
    assert not caches[1].any()

    written = caches[0].clone()
    caches[0].zero_()
    first.write(blocks, keys.transpose(0, 1), values.transpose(0, 1))
    assert torch.equal(caches[0], written)
    assert not other.keys(blocks, tokens).any()


def test_values_may_be_of_another_width() -> None:
    cache = torch.zeros(BLOCKS, HEADS, 16, WIDTH + 5)
    pages = GpuPages(cache, WIDTH, 16, writer(cache))
    keys, values = torch.randn(HEADS, 20, WIDTH), torch.randn(HEADS, 20, 5)
    blocks = torch.tensor([3, 1])
    pages.write(blocks, keys, values)
    assert torch.equal(pages.keys(blocks, 20), keys)
    assert torch.equal(pages.values(blocks, 20), values)


def test_an_unknown_layout_is_refused_and_the_cache_is_as_it_was() -> None:
    """Such as values first."""
    cache = torch.randn(BLOCKS, HEADS, 16, 2 * WIDTH)
    before, right = cache.clone(), writer(cache)
    with pytest.raises(ValueError, match=r"pages of 16 tokens of 3 heads .* does not know"):
        GpuPages(cache, WIDTH, 16, lambda keys, values, slots: right(values, keys, slots))
    assert torch.equal(cache, before)
