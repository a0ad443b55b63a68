"""What uneven heads cost: bytes and decoding of a cache whose heads differ, against an even one of
the same total.

    python benchmarks/ragged.py
    python benchmarks/ragged.py --batch 4 --shape 512,32,8,8 --mean 1000 --new 64

Both caches keep sinks and a window (`streaming_llm`, positions as written), so that nothing but the
form they are held in differs. The uneven one gives the KV heads of every layer lengths that lie
evenly between `--spread` low and high, which on average are `--mean`. After a prompt they decode in
turns, token by token; the figures are ratios of the CPU seconds of all tokens, evictions included:
of the whole model, of its attention blocks, and of the cache's part (append, attention, eviction).
Bytes are held over the sum of what the heads keep, metadata included.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from cost import Clock, Run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvhive
from kvhive.allocations import ALLOCATIONS, Allocation, Facts
from kvhive.spec import knob

PARTS = {"blocks": "attention blocks", "cache": "the cache's part of them"}
POLICY = "streaming_llm(positions=original, sink=1)"


@ALLOCATIONS.register("spread")
@dataclass(frozen=True)
class Spread(Allocation):
    """Shares that lie evenly between `low` and `high` times the mean, in another order a layer."""

    low: float = knob(0.05, "the least head's share of the mean")

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """int64 `[layers, kv_heads]`, the total exact."""
        heads = facts.kv_heads
        rise = torch.linspace(self.low, 2 - self.low, heads) * budget
        each = rise.round().long().clamp_min(floor)
        each[-1] += budget * heads - each.sum()
        return torch.stack([each.roll(layer) for layer in range(facts.layers)])


def model_of(shape: str) -> LlamaForCausalLM:
    """A random model: hidden size, heads, KV heads, layers."""
    width, heads, kv_heads, layers = map(int, shape.split(","))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        head_dim=64,
        vocab_size=1000,
        max_position_embeddings=16384,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def bytes_over_sum(cache: kvhive.HiveCache) -> float:
    """Bytes held over those of the keys and values that the heads keep."""
    layers = cache.hive_layers()
    kept = sum(int(layer.slots.tally.sum()) * layer._token_bytes for layer in layers)
    return cache.nbytes / kept


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="hidden,heads,KV heads,layers; default: SmolLM2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mean", type=int, default=205)
    parser.add_argument("--low", type=float, default=0.05)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = model_of(args.shape) if args.shape else kvhive.load("smollm2")[0]
    ids = torch.randint(3, 1000, (args.batch, 2 * args.mean + 40))
    even = Run(model, f"{POLICY}@{args.mean}", ids)
    uneven = Run(model, f"{POLICY}@{args.mean}/spread(low={args.low})", ids)
    held = bytes_over_sum(uneven.cache)
    for run in (even, uneven):
        run.step()
    clocks = Clock(even), Clock(uneven)
    whole = [0.0, 0.0]
    for _ in track(range(args.new), "decoding"):
        for place, clock in enumerate(clocks):
            start = time.process_time()
            clock.step()
            whole[place] += time.process_time() - start
    table = Table("", "uneven / even")
    table.add_row("decoding, CPU seconds a token", f"{whole[1] / whole[0]:.3f}")
    for what in ("blocks", "cache"):
        even_s, uneven_s = (getattr(clock, what).seconds for clock in clocks)
        table.add_row(f"of that, {PARTS[what]}", f"{uneven_s / even_s:.2f}")
    table.add_row("bytes / sum of what heads keep, after the prompt", f"{held:.3f}")
    table.add_row("the same of the even cache", f"{bytes_over_sum(even.cache):.3f}")
    table.add_row(
        "the same of the uneven one, after decoding", f"{bytes_over_sum(uneven.cache):.3f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
