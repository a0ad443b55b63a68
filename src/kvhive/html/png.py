"""A picture in one colour, as a data URI: what is drawn is its opacity."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def data_uri(opacity: Tensor, colour: str) -> str:
    """A PNG of `colour` ("#rrggbb") with the given opacity, float `[height, width]` in [0, 1].

    One colour with 256 opacities is readable on any background, so the page may be light or dark.
    """
    height, width = opacity.shape
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    level = (opacity.clamp(0, 1) * 255).round().to(torch.uint8)
    lines = torch.cat([level.new_zeros(height, 1), level], dim=1)  # filter 0 before every line
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    data = b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", bytes((red, green, blue)) * 256),
            _chunk(b"tRNS", bytes(range(256))),
            _chunk(b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)),
            _chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
