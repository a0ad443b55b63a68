"""Attention's two products with packed rows, and what packs them, in C on a CPU: `_packed.c`, where
it was compiled.

The environment variable KVHIVE_NATIVE=0 turns it off. Threads are torch's own (OpenMP), as many as
`torch.get_num_threads()` where the work is worth them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import lru_cache

import torch
from torch import Tensor

from kvhive.kernels import bits, native_build
from kvhive.kernels.packed_rows import PackedRows

WIDEST = 512  # numbers a token may have
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
JOB = struct.Struct("26q")  # `Job` of `_packed.c`: numbers, strides and addresses of 8 bytes each
CODING = struct.Struct("13q")  # `Coding` of `_packed.c`


def turned_off() -> bool:
    """Whether the user wants none of it."""
    return os.environ.get("KVHIVE_NATIVE") == "0"


@lru_cache(maxsize=1)
def loaded() -> ctypes.CDLL | None:
    """What was compiled from the sources that are here; None where that is not so."""
    if turned_off():
        return None
    try:
        found = ctypes.CDLL(str(native_build.HERE / native_build.LIBRARY))
    except OSError:
        return None
    found.kvhive_sources.restype = ctypes.c_char_p
    found.kvhive_lanes.restype = ctypes.c_int64
    if found.kvhive_sources().decode() != native_build.digest(native_build.HERE):
        return None
    found.kvhive_tiles.restype = ctypes.c_int64
    for name in ("logits", "mix", "code", "columns"):
        function = getattr(found, f"kvhive_{name}")
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return found


@lru_cache(maxsize=1)
def lanes() -> int:
    """Floats in a vector, with the best instructions that this machine has."""
    found = loaded()
    assert found is not None
    return int(found.kvhive_lanes())


def serves(rows: PackedRows, dense: Tensor, scores: Tensor) -> bool:
    """Whether `logits` and `mix` take these rows, with queries or outputs `[R, G, width]` and
    logits or weights `[R, G, N]`: all of it on a CPU, the latter two float32 without gaps between
    the numbers of a head, and nothing to be differentiated.
    """
    return (
        loaded() is not None
        and rows.codes.is_cpu
        and rows.codes.is_contiguous()
        and rows.grids.is_contiguous()
        and rows.grids.dtype in DTYPES
        and rows.bits in bits.WIDTHS
        and rows.width <= WIDEST
        and (rows.runs is None or rows.runs.ends.is_contiguous())
        and _lies_well(dense)
        and _lies_well(scores)
    )


def _lies_well(numbers: Tensor) -> bool:
    learns = numbers.requires_grad and torch.is_grad_enabled()
    plain = numbers.is_cpu and numbers.dtype == torch.float32
    return plain and numbers.stride(2) == 1 and not learns


def logits(query: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """As `packed.logits`, for what `serves` admits."""
    _run("kvhive_logits", query, out, rows, at)


def mix(weights: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """As `packed.mix`, for what `serves` admits."""
    _run("kvhive_mix", out, weights, rows, at)


def codes(numbers: Tensor, dtype: torch.dtype) -> bool:
    """Whether `coded` takes numbers `[N, width]`, for grids in `dtype`: on a CPU, and nothing to be
    differentiated.
    """
    learns = numbers.requires_grad and torch.is_grad_enabled()
    fits = dtype in DTYPES and numbers.shape[1] <= WIDEST
    return loaded() is not None and numbers.is_cpu and fits and not learns


def coded(
    numbers: Tensor, bits: int, group: int, dtype: torch.dtype, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `packed.coded`, the same bits, for what `codes` admits."""
    found = loaded()
    assert found is not None
    numbers = numbers.float().contiguous()
    tokens, width = numbers.shape
    ends = None if ends is None else ends.contiguous()
    count = tokens if ends is None else len(ends)
    data = torch.empty(tokens, width * bits // 8, dtype=torch.uint8)
    grids = torch.empty(count, 2, width // group, dtype=dtype)
    whole = found.kvhive_code(
        CODING.pack(
            lanes(),
            torch.get_num_threads(),
            bits,
            width,
            group,
            DTYPES[dtype],
            ends is not None,
            tokens,
            count,
            numbers.data_ptr(),
            0 if ends is None else ends.data_ptr(),
            data.data_ptr(),
            grids.data_ptr(),
        )
    )
    if not whole:
        raise ValueError(
            f"coded: groups of {group} must fill tokens of {width} numbers, and runs all {tokens} "
            f"tokens, got runs that end at {None if ends is None else ends.tolist()}"
        )
    return data, grids


def _run(product: str, dense: Tensor, scores: Tensor, rows: PackedRows, at: Tensor) -> None:
    found, runs = loaded(), rows.runs
    assert found is not None
    listed = [at.contiguous(), rows.starts.contiguous(), rows.lengths.contiguous()]
    if runs is not None:
        listed += [runs.starts.contiguous(), runs.counts.contiguous()]
    places = [one.data_ptr() for one in listed]
    whole = getattr(found, product)(
        JOB.pack(
            lanes(),
            torch.get_num_threads(),
            rows.bits,
            rows.width,
            rows.group,
            DTYPES[rows.grids.dtype],
            runs is not None,
            *dense.shape[:2],
            rows.codes.shape[0],
            rows.grids.shape[0],
            scores.shape[2],
            *dense.stride()[:2],
            *scores.stride()[:2],
            dense.data_ptr(),
            scores.data_ptr(),
            rows.codes.data_ptr(),
            rows.grids.data_ptr(),
            0 if runs is None else runs.ends.data_ptr(),
            *places,
            *[0] * (5 - len(places)),
        )
    )
    if not whole:
        raise ValueError(
            f"packed rows: starts {rows.starts.tolist()}, lengths {rows.lengths.tolist()} and "
            f"places {at.tolist()} must lie inside {len(rows.codes)} slots and {scores.shape[2]} "
            "places"
        )
