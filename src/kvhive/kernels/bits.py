"""Numbers of 2, 3, 4 or 8 bits: rounding to a grid between the least and the largest of a group,
and packing into bytes.

Source: the asymmetric quantiser of KIVI (Liu et al. 2024, arXiv:2402.02750), which rounds half to
even; a group of one single value is that value exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)  # bits a number may have
MULTIPLE = 8  # numbers of a token must be a multiple of it, so that planes fill whole bytes
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of each plane, the lowest first


def grid(least: Tensor, largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Scale and zero of groups, `[..., 2, w]` in `dtype`, from their extremes `[..., w]`."""
    step = (largest.float() - least.float()) / (2**bits - 1)
    return torch.stack([step, least.float()], -2).to(dtype)


def rounded(numbers: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """uint8 codes of float numbers on a grid of the same shape (or one that spreads to it)."""
    steps = (numbers.float() - zero.float()) / scale.float()
    return steps.nan_to_num_(0.0).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., d]` in `d * bits / 8` bytes; d is a multiple of 8.

    Planes of `p` bits lie one after another; byte j of a plane holds numbers j, j + d p / 8,
    j + 2 d p / 8, ..., the first in its lowest bits. Numbers of 3 bits have a plane of their lower
    2 bits and one of the highest.
    """
    parts, shift = [], 0
    for width in _PLANES[bits]:
        plane: Tensor = (codes >> shift) & (2**width - 1)
        if width == 8:
            return plane
        pieces = plane.unflatten(-1, (8 // width, -1)).unbind(-2)
        joined = pieces[0].clone()
        for place, piece in enumerate(pieces[1:], start=1):
            joined |= piece << (place * width)
        parts.append(joined)
        shift += width
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def unpacked(data: Tensor, bits: int, width: int) -> Tensor:
    """The reverse of `packed`: uint8 codes `[..., width]`."""
    if bits == 8:
        return data
    codes, first, shift = None, 0, 0
    for plane_bits in _PLANES[bits]:
        size = width * plane_bits // 8
        plane, mask = data[..., first : first + size], 2**plane_bits - 1
        pieces = [(plane >> (place * plane_bits)) & mask for place in range(8 // plane_bits)]
        part = torch.cat(pieces, -1)
        codes = part if codes is None else codes | (part << shift)
        first, shift = first + size, shift + plane_bits
    assert codes is not None
    return codes
