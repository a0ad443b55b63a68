"""What one token's attention costs over packed keys and values, against dense ones.

    python benchmarks/packed.py
    python benchmarks/packed.py --shape 8,4,128 --bits 8 --dtype float32

For each form (`rotated` has a grid for each token, keys of `kivi` one for each run of tokens) the
products with keys and values and the softmax between them, by the C kernel and by torch, in turns
with torch's fused attention over dense keys and values. Figures are the CPU seconds of a call, the
median of many, as milliseconds and as ratios to dense.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvhive.kernels import native, packed_reference
from kvhive.stores._rows import Form, PerChannel, PerToken

KERNELS = {"native": native, "torch": packed_reference}
SLOW = 10  # a call of the torch kernel is timed so many times more rarely


def dense(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
    """query `[R, G, d]`, keys and values `[R, n, d]`."""
    rows = query[None].to(keys.dtype), keys[None], values[None]
    return lambda: F.scaled_dot_product_attention(*rows)


def packed(
    kernel: ModuleType, forms: tuple[Form, Form], query: Tensor, keys: Tensor, values: Tensor
) -> Callable[[], object]:
    """The same with keys and values in these forms."""
    count, length, _ = keys.shape
    lengths, at = torch.full((count,), length), torch.zeros(count, dtype=torch.int64)
    sides = [
        form.packed(tokens.flatten(0, 1), lengths)
        for form, tokens in zip(forms, (keys, values), strict=True)
    ]
    scaled = query / query.shape[2] ** 0.5

    def attend() -> Tensor:
        weights, out = query.new_empty(*query.shape[:2], length), torch.zeros_like(query)
        kernel.logits(scaled, sides[0], weights, at)
        kernel.mix(weights.softmax(-1), sides[1], out, at)
        return out

    return attend


def seconds(calls: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """The median CPU seconds of each call, made in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(times):
        for name, call in calls.items():
            if turn and turn % SLOW and "torch" in name:
                continue
            start = time.process_time()
            call()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(each[1:] or each) for name, each in spent.items()}


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3,3,64", help="KV heads, query heads of each, width")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--dtype", default="bfloat16", help="of dense keys and values, and of grids"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if native.loaded() is None:
        raise SystemExit("the C kernels are not compiled: python -m kvhive.kernels.native_build")
    rows, group, width = map(int, args.shape.split(","))
    per_token = PerToken(args.bits, 32)
    forms = {
        "rotated": (per_token, per_token),
        "kivi": (PerChannel(args.bits, 32), per_token),
    }
    table = Table("tokens", "form", "ms", "/ dense")
    for tokens in args.tokens:
        query = torch.randn(rows, group, width)
        keys, values = torch.randn(2, rows, tokens, width).to(getattr(torch, args.dtype))
        calls = {f"dense {args.dtype}": dense(query, keys, values)}
        for kernel, module in KERNELS.items():
            for name, form in forms.items():
                calls[f"{name}, {kernel}"] = packed(module, form, query, keys, values)
        spent = seconds(calls, args.times)
        base = next(iter(spent.values()))
        for name, each in spent.items():
            table.add_row(f"{tokens:,}", name, f"{1e3 * each:.3f}", f"{each / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
