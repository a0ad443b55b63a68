"""An orthogonal matrix that spreads every number over all others, whatever the size."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int) -> Tensor:
    """Float32 `[size, size]`, orthogonal and symmetric: the scaled Hadamard matrix of the largest
    power of two in `size`; what is left (5 of 80, 3 of 96) is spread by a cosine transform.

    Raises `ValueError` for a size below 1.
    """
    if size < 1:
        raise ValueError(f"hadamard: size must be at least 1, got {size}")
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.kron(_cosines(size // power), matrix / math.sqrt(power)).float()


def _cosines(size: int) -> Tensor:
    """Orthonormal and symmetric, float64 `[size, size]` (the cosine transform of type IV)."""
    half = torch.arange(size, dtype=torch.float64) + 0.5
    return math.sqrt(2 / size) * torch.cos(math.pi / size * half[:, None] * half)
