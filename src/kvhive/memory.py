"""Memory for what the cache keeps: blocks that go back to the system when they are freed, and the
copies of slots that evictions and growth make, and how much of it tensors take.

On CPU, tensors that outlive a step must not lie between the step's temporaries: the heap around
them could then never shrink, and an evicted cache would leave the process as large as a full one.
So they get pages of their own. Other devices have allocators that deal with this.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator

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


def take(tensor: Tensor, rows: Tensor, kept: int, room: int) -> Tensor:
    """Gather `kept` slots of each head: `[b, K, n, *rest]` -> `[b, K, room, *rest]`.

    rows: int64 `[b * K * kept]`, their places when all slots lie one after the other. What is left
    of the room is zeroed. Where there were as many slots before, they are written in place: fresh
    pages would cost more than all the copying. Whole rows are copied (`index_select` on the
    flattened tensor), several times faster on CPU than an element-wise `gather`.
    """
    batch, heads, n, *rest = tensor.shape
    held = tensor.reshape(batch * heads * n, *rest).index_select(0, rows)
    held = held.view(batch, heads, kept, *rest)
    if n != room:
        return widen(held, kept, room)
    tensor[:, :, :kept] = held
    tensor[:, :, kept:] = 0
    return tensor


def widen(tensor: Tensor, used: int, room: int) -> Tensor:
    """A copy of the first `used` slots of `[b, K, n, *rest]` with zeroed room for `room`."""
    batch, heads, _, *rest = tensor.shape
    wide = zeros((batch, heads, room, *rest), tensor.dtype, tensor.device)
    wide[:, :, :used] = tensor[:, :, :used]
    return wide


def storage_bytes(values: Iterable[object]) -> int:
    """Bytes of the storage of all tensors among values, in lists and dictionaries too; what several
    of them share counts once.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(values))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
