"""Prefill and decode speed of recipes against transformers' own cache, side by side in one process.

    python benchmarks/speed.py --prompt 4096 --new 128 --recipe full --recipe buzz@0.4

Every round runs the stock `DynamicCache` with sdpa and then each recipe on the same prompt; a
recipe's figure is the median over rounds of its ratio to the stock cache of the same round, because
a shared machine's speed drifts between rounds but less within one. `--long` instead decodes on and
compares the cost per token early and late: nothing may grow with the tokens seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import kvhive

STOCK = "stock"


@dataclass(frozen=True)
class Timing:
    """One run: seconds of prefill, median seconds a decoded token, bytes held at the end."""

    prefill: float
    token: float
    nbytes: int


def new_cache(model: PreTrainedModel, recipe: str) -> Cache:
    """A fresh cache, the model's attention set to match it."""
    if recipe != STOCK:
        return kvhive.HiveCache.for_model(model, recipe)
    model.set_attn_implementation("sdpa")
    return DynamicCache(config=model.config)


def nbytes(cache: Cache) -> int:
    """Bytes held by either kind of cache."""
    if isinstance(cache, kvhive.HiveCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, token: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each of `steps` greedy decoding steps."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def run(model: PreTrainedModel, recipe: str, ids: torch.Tensor, new: int) -> Timing:
    """Prefill `ids` and decode `new` tokens."""
    cache = new_cache(model, recipe)
    start = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    prefill = time.perf_counter() - start
    seconds = decode(model, cache, logits[:, -1:].argmax(-1), new)
    return Timing(prefill, statistics.median(seconds), nbytes(cache))


def side_by_side(model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace) -> Table:
    """All recipes against the stock cache, `args.rounds` times."""
    recipes = [STOCK, *args.recipe]
    runs: dict[str, list[Timing]] = {recipe: [] for recipe in recipes}
    for _ in range(args.rounds):
        for recipe in recipes:
            runs[recipe].append(run(model, recipe, ids, args.new))
    table = Table(
        title=f"{args.prompt:,} tokens + {args.new}, {args.threads} thread(s), {args.rounds} rounds"
    )
    for column in ("cache", "prefill s", "x stock", "ms a token", "speed x stock", "bytes / stock"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for recipe in recipes:
        pairs = list(zip(runs[recipe], runs[STOCK], strict=True))
        table.add_row(
            recipe,
            f"{statistics.median(r.prefill for r in runs[recipe]):.2f}",
            f"{statistics.median(r.prefill / s.prefill for r, s in pairs):.2f}",
            f"{statistics.median(r.token for r in runs[recipe]) * 1e3:.1f}",
            f"{statistics.median(s.token / r.token for r, s in pairs):.2f}",
            f"{runs[recipe][-1].nbytes / runs[STOCK][-1].nbytes:.3f}",
        )
    return table


def early_and_late(model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace) -> Table:
    """Cost per token around token 200 and around token 2,000 of decoding."""
    table = Table(title=f"{args.prompt:,} tokens, then 2,100 decoded; median ms a token")
    for column in ("cache", "tokens 150-250", "tokens 1,950-2,050", "late / early"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for recipe in args.recipe:
        cache = new_cache(model, recipe)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        seconds = decode(model, cache, logits[:, -1:].argmax(-1), 2100)
        early, late = statistics.median(seconds[150:250]), statistics.median(seconds[1950:2050])
        table.add_row(recipe, f"{early * 1e3:.1f}", f"{late * 1e3:.1f}", f"{late / early:.2f}")
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=4096, help="prompt tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--long", action="store_true", help="cost per token early and late instead")
    parser.add_argument("--recipe", action="append", default=None)
    args = parser.parse_args()
    args.recipe = args.recipe or ["full", "buzz@0.4", "h2o@0.4", "streaming_llm@0.4"]
    torch.set_num_threads(args.threads)
    model, _ = kvhive.load(args.model, dtype=args.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size - 100, (1, args.prompt), generator=generator)
    Console().print((early_and_late if args.long else side_by_side)(model, ids, args))


if __name__ == "__main__":
    main()
