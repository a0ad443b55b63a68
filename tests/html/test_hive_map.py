"""The picture of what survived, pixel by pixel."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest
import torch

from kvhive.comparison.survivors import Survivors
from kvhive.html.hive_map import HiveMap, summary
from kvhive.html.png import data_uri


def decoded(uri: str) -> tuple[torch.Tensor, bytes]:
    """Opacity in 0..255 of every pixel, and the palette, read back without the code under test."""
    data = base64.b64decode(uri.partition("base64,")[2])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        (check,) = struct.unpack(">I", data[place + 8 + size : place + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(height, width + 1)
    assert not lines[:, 0].any()
    assert chunks[b"tRNS"] == bytes(range(256))
    return lines[:, 1:], chunks[b"PLTE"]


def survivors(layers: int, heads: int, seen: int) -> Survivors:
    kept = torch.rand(layers * heads, seen, generator=torch.Generator().manual_seed(0)) < 0.3
    return Survivors(kept, tuple((2 * i, j) for i in range(layers) for j in range(heads)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (40, 7)])
def test_a_picture_reads_back(height, width):
    opacity = torch.linspace(0, 1, height * width).view(height, width)
    pixels, palette = decoded(data_uri(opacity, "#0a141e"))
    assert torch.equal(pixels, (opacity * 255).round().long())
    assert palette == bytes((10, 20, 30)) * 256


@pytest.mark.parametrize(("layers", "heads", "seen"), [(1, 1, 1), (3, 2, 13), (32, 8, 700)])
def test_every_line_of_the_picture_is_a_head(layers, heads, seen):
    what = survivors(layers, heads, seen)
    drawn = HiveMap.of(what, "#d98200")
    pixels, _ = decoded(drawn.picture)
    rows = drawn.data.partition("|")[0].split(";")
    assert (len(pixels), drawn.seen) == (drawn.height, seen)
    assert pixels.shape[1] == seen
    assert len(rows) == layers * heads
    for row, kept, (layer, head) in zip(rows, what.kept, what.rows, strict=True):
        named_layer, named_head, top = map(int, row.split(","))
        assert (named_layer, named_head) == (layer, head)
        assert torch.equal(pixels[top] == 255, kept)


@pytest.mark.parametrize("seen", [1, 8, 13, 700])
def test_the_hover_script_gets_the_same_bits(seen):
    what = survivors(3, 2, seen)
    packed = HiveMap.of(what, "#d98200").data.partition("|")[2]
    data = base64.b64decode(packed)
    stride = -(-seen // 8)
    assert len(data) == 6 * stride
    for row in range(6):
        for token in range(seen):
            bit = data[row * stride + token // 8] >> (token % 8) & 1
            assert bit == what.kept[row, token]


def test_long_documents_are_pooled():
    what = survivors(2, 1, 5000)
    drawn = HiveMap.of(what, "#d98200")
    pixels, _ = decoded(drawn.picture)
    assert (pixels.shape[1], drawn.profile_width) == (1600, 400)
    assert float(pixels[0].float().mean() / 255) == pytest.approx(0.3, abs=0.03)


def test_the_summary_counts_heads():
    kept = torch.tensor([[True, True, False, False], [True, False, False, True]])
    said = summary(Survivors(kept, ((0, 0), (1, 0))))
    assert said == "75% of the tokens are still held by some head, 25% by all 2 heads"


@pytest.mark.parametrize("seen", [1, 7, 99, 2956, 32_768])
def test_scales_are_few_round_numbers_within_the_picture(seen):
    drawn = HiveMap.of(survivors(30, 1, seen), "#d98200")
    assert 1 <= len(drawn.ticks) <= 5
    assert drawn.ticks[0] == (0, "0")
    assert all(0 <= place <= 92 for place, _ in drawn.ticks)
    assert [layer for _, layer in drawn.layers] == [0, 10, 20, 30, 40, 50]
