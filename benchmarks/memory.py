"""Memory of recipes: peak resident set over the weights, and the peak of the cache during chunked
prefill.

    python benchmarks/memory.py --prompt 4096 --recipe full --recipe buzz@0.4
    python benchmarks/memory.py --prompt 8000 --chunk 512 --recipe h2o@1024

Each cache runs in a fresh process, since a process's peak never goes down. "cache peak" is the
largest `nbytes` of the cache seen after any layer of any step, in units of the full cache's bytes a
token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table
from speed import STOCK, nbytes, new_cache

import kvhive

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory that are its own: mapped files, such as weights, left out."""
    held = psutil.Process().memory_info()
    return int(held.rss - held.shared)


def watch(stop: threading.Event, peak: list[int]) -> None:
    """Sample this process's resident bytes every millisecond into peak[0]."""
    while not stop.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, float]:
    """One cache in this process: prefill (whole or in chunks), then a few decoded tokens."""
    torch.set_num_threads(args.threads)
    model, _ = kvhive.load(args.model, dtype=args.dtype)
    model(torch.tensor([[1, 2, 3]]), use_cache=False)
    cache = new_cache(model, args.one)
    cache_peak = 0

    def look(*_: object) -> None:
        nonlocal cache_peak
        cache_peak = max(cache_peak, nbytes(cache) if cache.is_initialized else 0)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(look)
    ids = torch.randint(100, 40000, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    before = resident()
    peak, stop = [before], threading.Event()
    thread = threading.Thread(target=watch, args=(stop, peak), daemon=True)
    thread.start()
    for chunk in ids.split(args.chunk or args.prompt, dim=1):
        logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    prefill_peak = peak[0]
    token = logits[:, -1:].argmax(-1)
    for _ in range(args.new):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    stop.set()
    thread.join()
    config = model.config
    width = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return {
        "rss": (prefill_peak - before) / MIB,
        "after": (resident() - before) / MIB,
        "cache": nbytes(cache) / MIB,
        "cache_peak": cache_peak / MIB,
        "cache_peak_tokens": cache_peak / (width * config.num_hidden_layers),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=0, help="prefill chunk; 0: whole")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    table = Table(title=f"{args.prompt:,} tokens, chunk {args.chunk or 'none'}; MiB")
    columns = ("prefill peak RSS", "RSS after", "cache", "cache peak", "= full tokens")
    table.add_column("cache")
    for column in columns:
        table.add_column(column, justify="right")
    for recipe in [STOCK, *(args.recipe or ["full", "buzz@0.4", "h2o@0.4", "streaming_llm@0.4"])]:
        command = [sys.executable, *sys.argv, "--one", recipe]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        keys = ("rss", "after", "cache", "cache_peak", "cache_peak_tokens")
        table.add_row(recipe, *(f"{row[key]:,.1f}" for key in keys))
    Console().print(table)


if __name__ == "__main__":
    main()
