"""Memory for what the cache keeps: blocks that go back to the system when they are freed.

On CPU, tensors that outlive a step must not lie between the step's temporaries: the heap around
them could then never shrink, and an evicted cache would leave the process as large as a full one.
So they get pages of their own. Other devices have allocators that deal with this.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

SMALLEST = 1 << 16  # bytes; below this a block of whole pages would waste more than it saves


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed, contiguous tensor; on CPU in anonymous pages that are unmapped when it is freed."""
    number = math.prod(shape)
    small = number * dtype.itemsize < SMALLEST
    if device.type != "cpu" or small or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked process gets a copy of its own
    pages = mmap.mmap(-1, number * dtype.itemsize, flags=private)
    return torch.frombuffer(pages, dtype=dtype, count=number).view(shape)
