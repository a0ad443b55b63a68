"""The attention that keys receive in a step, summed over its queries, in C on a CPU: `_columns.c`,
where it was compiled. bfloat16 is multiplied as it is on machines that do so (AMX).
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch
from torch import Tensor

from kvhive.kernels import native
from kvhive.kernels.contracts import Ask

STEP = struct.Struct("22qd")  # `Step` of `_columns.c`


@lru_cache(maxsize=1)
def tiles() -> bool:
    """Whether this machine multiplies tiles of bfloat16 (AMX), which this asks the system for."""
    found = native.loaded()
    assert found is not None
    return bool(found.kvhive_tiles())


def serves(query: Tensor, keys: Tensor, ask: Ask) -> bool:
    """Whether `columns` takes query `[b, H, q, d]` and keys `[b, K, n, d]`: on a CPU, of one dtype
    of 16 or 32 bits, without gaps between a token's numbers; nothing is padded, empty, decayed, nor
    to be differentiated.
    """
    needs, (q, width), n = ask.needs, query.shape[2:], keys.shape[2]
    return (
        needs.columns is not None
        and needs.decay == 1.0
        and ask.step.real is None
        and ask.valid is None
        and ask.scale > 0
        and q > 0
        and n >= (q if ask.causal else 1)
        and 0 < width <= native.WIDEST
        and query.dtype == keys.dtype
        and keys.dtype in native.DTYPES
        and _lies_well(query)
        and _lies_well(keys)
        and native.loaded() is not None
    )


def _lies_well(tokens: Tensor) -> bool:
    learns = tokens.requires_grad and torch.is_grad_enabled()
    return tokens.is_cpu and tokens.stride(3) == 1 and not learns


def columns(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """As `chunked.columns`, for what `serves` admits: float32 `[b, K, n]`, or `[b, H, n]`."""
    found = native.loaded()
    assert found is not None
    (batch, heads, q, width), (kv_heads, n) = query.shape, keys.shape[1:3]
    shape = batch, kv_heads if ask.needs.fold else heads, n
    out = keys.new_empty(shape, dtype=torch.float32)
    size = keys.element_size()
    whole = found.kvhive_columns(
        STEP.pack(
            native.lanes(),
            tiles(),
            torch.get_num_threads(),
            native.DTYPES[keys.dtype],
            ask.causal,
            ask.needs.columns == "square",
            ask.needs.fold,
            batch,
            kv_heads,
            heads // kv_heads,
            q,
            n,
            width,
            *(size * stride for stride in query.stride()[:3]),
            *(size * stride for stride in keys.stride()[:3]),
            query.data_ptr(),
            keys.data_ptr(),
            out.data_ptr(),
            ask.scale * math.log2(math.e),
        )
    )
    if not whole:
        raise MemoryError(f"columns: no room to work out what {q} queries give {n} slots")
    return out
