"""What it costs to sum the attention that keys receive, against attending.

    python benchmarks/columns.py
    python benchmarks/columns.py --shape 2,4,128 --dtype float32 --queries 16

One layer's step of random tokens: torch's fused attention, in turns with the columns alone, by the
C kernel and by torch, and with attention that reports columns, both ways. Figures are the CPU
seconds of a call, the median of many, as milliseconds and as ratios to fused attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from packed import seconds
from rich.console import Console
from rich.table import Table

from kvhive.kernels import Ask, Needs, attend, chunked, fused, native, native_columns
from kvhive.step import Step


def calls(shape: str, dtype: str, tokens: int, q: int) -> dict[str, Callable[[], object]]:
    """What is timed, over `tokens` keys of which the last q are the step's own."""
    kv_heads, group, width = map(int, shape.split(","))
    query = torch.randn(1, q, kv_heads * group, width).to(getattr(torch, dtype)).transpose(1, 2)
    keys, values = torch.randn(2, 1, kv_heads, tokens, width).to(query.dtype)
    ask = Ask(Step.plain(tokens - q, q), width**-0.5, Needs(columns="sum"))
    return {
        "fused attention": lambda: fused.attend(query, keys, values, ask),
        "columns, C": lambda: native_columns.columns(query, keys, ask),
        "columns, torch": lambda: chunked.columns(query, keys, ask),
        "both, C": lambda: attend(query, keys, values, ask),
        "both, torch": lambda: chunked.attend(query, keys, values, ask),
    }


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3,3,64", help="KV heads, query heads of each, width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--queries", type=int, help="the last of the tokens; default: all")
    parser.add_argument("--times", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if native.loaded() is None:
        raise SystemExit("the C kernels are not compiled: python -m kvhive.kernels.native_build")
    table = Table("tokens", "queries", "what", "ms", "/ fused attention")
    for tokens in args.tokens:
        q = args.queries or tokens
        spent = seconds(calls(args.shape, args.dtype, tokens, q), args.times)
        base = spent["fused attention"]
        for name, each in spent.items():
            ms, ratio = f"{1e3 * each:.2f}", f"{each / base:.2f}"
            table.add_row(f"{tokens:,}", f"{q:,}", name, ms, ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
