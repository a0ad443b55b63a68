"""Pages are read and written as vLLM's kernels pack them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm import _custom_ops as ops

from kvhive_vllm.cpu_pages import PACKINGS, CpuPages, Rows
from kvhive_vllm.pages import tokens_of, whole_pages

HEADS, PAGES = 3, 9


def written_by(isa: str, cache: Tensor):  # type: ignore[no-untyped-def]
    """vLLM's own writer, for one set of instructions."""
    pages, heads, size, _ = cache.shape
    keys_part, values_part = cache.view(pages, heads, 2 * size, -1).chunk(2, dim=2)

    def write(keys: Tensor, values: Tensor, slots: Tensor) -> None:
        scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
        ops.cpu_attn_reshape_and_cache(keys, values, keys_part, values_part, slots, isa, **scales)

    return write


KINDS = [
    ("vec", torch.float32, 32, 64),
    ("vec", torch.bfloat16, 64, 128),
    ("vec16", torch.float32, 16, 80),
    ("vec16", torch.bfloat16, 48, 112),
    ("amx", torch.bfloat16, 32, 64),
    ("amx", torch.bfloat16, 64, 96),
    ("vec", torch.float16, 32, 32),
]


def _kind(isa: str, dtype: torch.dtype, size: int, width: int) -> tuple[Tensor, object]:
    cache = torch.randn(PAGES, HEADS, size, 2 * width).to(dtype)
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has no AMX, whose writer vLLM then lacks")
    return cache, written_by(isa, cache)


@pytest.mark.parametrize(("isa", "dtype", "size", "width"), KINDS)
def test_what_the_engine_writes_is_read(
    isa: str, dtype: torch.dtype, size: int, width: int
) -> None:
    cache, write = _kind(isa, dtype, size, width)
    before = cache.clone()
    pages = CpuPages(cache, 2 * size, write)  # type: ignore[arg-type]
    assert torch.equal(cache, before)
    blocks, n = torch.tensor([3, 1]), 3 * size + 7
    slots = (blocks[:, None] * 2 * size + torch.arange(2 * size)).flatten()[:n]
    keys, values = torch.randn(2, n, HEADS, width).to(dtype)
    write(keys, values, slots)  # type: ignore[operator]
    assert torch.equal(pages.keys(blocks, n), keys.transpose(0, 1))
    assert torch.equal(pages.values(blocks, n), values.transpose(0, 1))
    both = pages.both(blocks, n)
    assert torch.equal(both[0], pages.keys(blocks, n))
    assert torch.equal(both[1], pages.values(blocks, n))


@pytest.mark.parametrize(("isa", "dtype", "size", "width"), KINDS)
def test_what_is_written_here_is_what_the_engine_would_write(
    isa: str, dtype: torch.dtype, size: int, width: int
) -> None:
    cache, write = _kind(isa, dtype, size, width)
    pages = CpuPages(cache, size, write)  # type: ignore[arg-type]
    blocks, n = torch.tensor([5, 2, 7]), 2 * size + 5
    keys, values = torch.randn(2, HEADS, n, width).to(dtype)
    pages.write(blocks, keys, values)
    ours, slots = cache.clone(), (blocks[:, None] * size + torch.arange(size)).flatten()[:n]
    write(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), slots)  # type: ignore[operator]
    assert torch.equal(cache, ours)
    assert torch.equal(pages.keys(blocks, n), keys)
    assert torch.equal(pages.values(blocks, n), values)


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([16, 32, 64]), width=st.sampled_from([16, 32, 80]), rows=st.integers(1, 4)
)
def test_packings_are_the_inverse_of_themselves(size: int, width: int, rows: int) -> None:
    for packing in PACKINGS:
        for dtype in (torch.bfloat16, torch.float32):
            tiles = torch.randn(rows, size, width).to(dtype)
            if not packing.fits(tiles, size, width):
                continue
            assert torch.equal(packing.unpack(packing.pack(tiles), size), tiles)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 100), size=st.sampled_from([16, 32]))
def test_tokens_fill_whole_pages(n: int, size: int) -> None:
    rows = torch.randn(2, n, 4)
    pages = whole_pages(rows, size)
    assert pages.shape == (-(-n // size), 2, size, 4)
    assert torch.equal(tokens_of(pages, n), rows)


def test_an_unknown_packing_is_refused() -> None:
    cache = torch.randn(PAGES, HEADS, 32, 128)

    def shuffled(keys: Tensor, values: Tensor, slots: Tensor) -> None:
        tiles = cache.view(PAGES, HEADS, 2, -1)
        tiles[-1, :, 0] = Rows().pack(keys.transpose(0, 1)).flip(-1)
        tiles[-1, :, 1] = Rows().pack(values.transpose(0, 1))

    with pytest.raises(ValueError, match="in a way that kvhive-vllm does not know"):
        CpuPages(cache, 32, shuffled)
