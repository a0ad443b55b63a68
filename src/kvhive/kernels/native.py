"""Attention's two products with packed rows in C, on a CPU: `_packed.c`, where it was compiled.

The environment variable KVHIVE_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

import torch
from torch import Tensor

from kvhive.kernels import bits, native_build
from kvhive.kernels.packed_rows import PackedRows

WIDEST = 512  # numbers a token may have
WORTH = 1 << 16  # numbers that are worth one more thread
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

_NUMBERS = "lanes threads bits width group dtype rows heads slots marks places"
_STRIDES = "dense_row dense_head scores_row scores_head"
_POINTERS = "dense scores at codes grids starts lengths ends run_starts run_counts"


class Job(ctypes.Structure):
    """What both products are told, as `_packed.c` has it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in f"{_NUMBERS} {_STRIDES}".split()),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """What was compiled from the sources that are here; None where that is not so."""
    if os.environ.get("KVHIVE_NATIVE") == "0":
        return None
    try:
        found = ctypes.CDLL(str(native_build.HERE / native_build.LIBRARY))
    except OSError:
        return None
    found.kvhive_sources.restype = ctypes.c_char_p
    found.kvhive_lanes.restype = ctypes.c_int64
    if found.kvhive_sources().decode() != native_build.digest(native_build.HERE):
        return None
    for product in (found.kvhive_logits, found.kvhive_mix):
        product.argtypes, product.restype = [ctypes.POINTER(Job)], ctypes.c_int64
    return found


@lru_cache(maxsize=1)
def lanes() -> int:
    """Floats in a vector, with the best instructions that this machine has."""
    found = library()
    assert found is not None
    return int(found.kvhive_lanes())


def serves(rows: PackedRows, dense: Tensor, scores: Tensor) -> bool:
    """Whether `logits` and `mix` take these rows, with queries or outputs `[R, G, width]` and
    logits or weights `[R, G, N]`: all of it on a CPU, the latter two float32 without gaps between
    the numbers of a head, and nothing to be differentiated.
    """
    arrays = [rows.codes, rows.grids]
    arrays += [] if rows.runs is None else [rows.runs.ends]
    return (
        rows.bits in bits.WIDTHS
        and rows.width <= WIDEST
        and rows.width % bits.MULTIPLE == 0
        and rows.grids.dtype in DTYPES
        and all(array.device.type == "cpu" and array.is_contiguous() for array in arrays)
        and all(
            array.dtype == torch.float32
            and array.device.type == "cpu"
            and array.stride(-1) == 1
            and not (array.requires_grad and torch.is_grad_enabled())
            for array in (dense, scores)
        )
        and library() is not None
    )


def logits(query: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """As `packed.logits`, for what `serves` admits."""
    _run("kvhive_logits", query, out, rows, at)


def mix(weights: Tensor, rows: PackedRows, out: Tensor, at: Tensor) -> None:
    """As `packed.mix`, for what `serves` admits."""
    _run("kvhive_mix", out, weights, rows, at)


def _run(product: str, dense: Tensor, scores: Tensor, rows: PackedRows, at: Tensor) -> None:
    found = library()
    assert found is not None
    starts, lengths, at = rows.starts.contiguous(), rows.lengths.contiguous(), at.contiguous()
    numbers = int(lengths.sum()) * rows.width
    if numbers == 0:
        return
    job = Job(
        lanes=lanes(),
        threads=max(1, min(torch.get_num_threads(), numbers // WORTH)),
        bits=rows.bits,
        width=rows.width,
        group=rows.group,
        dtype=DTYPES[rows.grids.dtype],
        rows=len(lengths),
        heads=dense.shape[1],
        slots=len(rows.codes),
        marks=len(rows.grids),
        places=scores.shape[2],
        dense_row=dense.stride(0),
        dense_head=dense.stride(1),
        scores_row=scores.stride(0),
        scores_head=scores.stride(1),
        dense=dense.data_ptr(),
        scores=scores.data_ptr(),
        at=at.data_ptr(),
        codes=rows.codes.data_ptr(),
        grids=rows.grids.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
    )
    if rows.runs is not None:
        run_starts, run_counts = rows.runs.starts.contiguous(), rows.runs.counts.contiguous()
        job.ends = rows.runs.ends.data_ptr()
        job.run_starts, job.run_counts = run_starts.data_ptr(), run_counts.data_ptr()
    if not getattr(found, product)(job):
        raise ValueError(
            f"packed rows: starts {starts.tolist()}, lengths {lengths.tolist()} and places "
            f"{at.tolist()} must lie inside {len(rows.codes)} slots and {scores.shape[2]} places"
        )
