"""Column sums of attention without attending, with Triton: for prompts of thousands of queries, and
for a few decoded queries that vote together.

Experimental: its numbers are tested in Triton's interpreter alone. It compiles for GPUs but has
never run on one, and sizes of tiles are guesses.

The keys are read twice. Programs for tiles of queries find each query's log-sum-exp, as
FlashAttention does (Dao 2023) but without values; where queries are few, the slots are cut into
splits that run at once. Programs for blocks of slots then walk the queries that see them and sum
what each gives. Every sum has one program and a fixed order: no atomics, the same result each time.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvhive.kernels.contracts import Ask
from kvhive.kernels.triton_tiles import DTYPES, LEAST, SPLIT, WIDEST, block, power, wide

BUSY = 1024  # programs that keep a GPU busy: no more splits than that takes


def fits(query: Tensor, keys: Tensor, ask: Ask) -> bool:
    """Whether `columns` takes this step: column sums without decay, no padding, no empty slots.

    Shapes as `columns`.
    """
    return _obstacle(query, keys, ask) is None


def columns(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """As `chunked.columns`: float32 `[b, K, n]`, or `[b, H, n]` without fold.

    query `[b, H, q, d]` and keys `[b, K, n, d]`, the numbers of a head side by side; both float16,
    bfloat16 or float32; d at most 256. Logits and sums are float32. Raises ImportError without
    Triton, ValueError for steps that do not fit.
    """
    obstacle = _obstacle(query, keys, ask)
    if obstacle is not None:
        raise ValueError(obstacle)
    programs = _programs()
    batch, heads, q, width = query.shape
    kv_heads, n = keys.shape[1:3]
    group, size = heads // kv_heads, block(width, keys.dtype)
    places = *query.stride()[:3], *keys.stride()[:3]
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "BLOCK": size,
        "D": width,
        "WIDE_D": wide(width),
        "FACTORS": programs.factors(keys.dtype),
        "CAUSAL": ask.causal,
    }

    rows = _tall(q * group, size)
    tiles = -(-q * group // rows)
    split = _split(n, batch * kv_heads * tiles)
    splits = -(-n // split)
    lse = query.new_empty(splits, batch, heads, q, dtype=torch.float32)
    stack = group if ask.needs.fold else 1
    total = lse.new_empty(batch, heads // stack, n)
    with torch.cuda.device_of(keys):
        programs.log_sums[(batch * kv_heads, tiles, splits)](
            query, keys, lse, *places, ask.scale, q, n, split, STACK=group, ROWS=rows, **constants
        )
        programs.received[(batch * heads // stack, -(-n // size))](
            query,
            keys,
            lse.logsumexp(0) if splits > 1 else lse,
            total,
            *places,
            ask.scale,
            q,
            n,
            STACK=stack,
            ROWS=_tall(q * stack, size),
            SQUARE=ask.needs.columns == "square",
            **constants,
        )
    return total


def _tall(entries: int, most: int) -> int:
    """Entries of one tile, for so many in all."""
    return max(LEAST, min(power(entries), most))


def _split(n: int, programs: int) -> int:
    """Slots of one split, a multiple of SPLIT: so many that few programs become BUSY."""
    most = -(-n // SPLIT)
    return SPLIT * -(-most // max(1, min(most, BUSY // programs)))


def _obstacle(query: Tensor, keys: Tensor, ask: Ask) -> str | None:
    """Why the programs cannot take a step, in one sentence."""
    needs, width = ask.needs, keys.shape[-1]
    obstacles = {
        f"needs: expected columns without decay, got {needs.columns}, decay {needs.decay:g}": (
            needs.columns is None or needs.decay != 1.0
        ),
        "ask: expected no padded queries and no empty slots; leave such steps to torch": (
            ask.step.real is not None or ask.valid is not None
        ),
        "queries and keys: expected one dtype of float16, bfloat16 and float32, "
        f"got {query.dtype} and {keys.dtype}": (
            keys.dtype not in DTYPES or query.dtype != keys.dtype
        ),
        f"keys: expected heads of {query.shape[-1]} numbers, as the queries, and at most {WIDEST}, "
        f"got {width}": width != query.shape[-1] or width > WIDEST,
        "queries and keys: expected the numbers of a head side by side, "
        f"got strides {list(query.stride())} and {list(keys.stride())}": (
            query.stride(-1) != 1 or keys.stride(-1) != 1
        ),
    }
    return next((sentence for sentence, there in obstacles.items() if there), None)


def _programs() -> ModuleType:
    """The programs, which load Triton."""
    try:
        from kvhive.kernels import triton_columns_programs
    except ImportError as error:
        raise ImportError("Triton is missing; install the package triton") from error
    return triton_columns_programs
