"""Prefill and decode speed of recipes against transformers' own cache, side by side in one process.

    python benchmarks/speed.py --prompt 16 --prompt 4096 --new 128 --recipe full --recipe buzz@0.4
    python benchmarks/speed.py --prompt 4096 --chunk 512 --recipe streaming_llm@0.4

Every round reads the same prompt with the stock `DynamicCache` (sdpa) and with each recipe, and
then all of them decode in turns, token by token, because a shared machine's speed drifts within
seconds. A recipe's figure is the median over rounds of its ratio to the stock cache of the same
round. With one thread on a CPU all times are CPU seconds of the process, which a busy machine
disturbs less than the clock on the wall.

How much faster depends on the machine: reading the weights is the floor that no cache goes below.
So beside the ratio stands the *avoided share*: (stock - recipe) / (stock - floor) per decoded
token, the floor being what the stock cache takes in the same round after a prompt of 16 tokens. 1
means that the whole price of a long cache is gone, 0 none of it.

`--chunk` reads the prompt in chunks too, and prints their time over that of one piece. `--long`
instead decodes on and compares the cost per token early and late: nothing may grow with the tokens
seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import kvhive

STOCK, FLOOR, FLOOR_TOKENS = "stock", "floor", 16


@dataclass(frozen=True)
class Timing:
    """One run: seconds of prefill, median seconds a decoded token, bytes held at the end.

    chunked: seconds of prefill in chunks; None: not asked for.
    """

    prefill: float
    token: float
    nbytes: int
    chunked: float | None


class Run:
    """One cache of one round: reads the prompt, then decodes token by token."""

    def __init__(self, model: PreTrainedModel, recipe: str, ids: Tensor) -> None:
        self.model = model
        self.attention = "sdpa" if recipe in (STOCK, FLOOR) else "kvhive"
        self.ids = ids[:, :FLOOR_TOKENS] if recipe == FLOOR else ids
        if self.attention == "kvhive":
            self.cache: Cache = kvhive.HiveCache.for_model(model, recipe)
        else:
            self.cache = DynamicCache(config=model.config)
        self.seconds: list[float] = []

    def prefill(self, chunk: int | None = None) -> float:
        """Seconds to read the prompt, in one piece or in chunks."""
        self.model.set_attn_implementation(self.attention)
        parts = self.ids.split(chunk or self.ids.shape[1], 1)
        start = now(self.model)
        for part in parts:
            logits = self.model(part, past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits[:, -1:].argmax(-1)
        return now(self.model) - start

    def step(self) -> None:
        """Decode a token, timed."""
        self.model.set_attn_implementation(self.attention)
        start = now(self.model)
        logits = self.model(self.token, past_key_values=self.cache).logits
        self.token = logits[:, -1:].argmax(-1)
        self.seconds.append(now(self.model) - start)

    @property
    def nbytes(self) -> int:
        """Bytes held by either kind of cache."""
        if isinstance(self.cache, kvhive.HiveCache):
            return self.cache.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def now(model: PreTrainedModel) -> float:
    """Seconds: of the process where one CPU thread does it all, of the clock otherwise."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@torch.no_grad()
def one_round(
    model: PreTrainedModel, recipes: list[str], ids: Tensor, new: int, chunk: int | None
) -> dict[str, Timing]:
    """All caches on one prompt, decoding in turns."""
    runs = {recipe: Run(model, recipe, ids) for recipe in recipes}
    prefill = {recipe: run.prefill() for recipe, run in runs.items()}
    chunked = dict.fromkeys(recipes, None) if chunk is None else {}
    for recipe in recipes if chunk is not None else ():
        chunked[recipe] = Run(model, recipe, ids).prefill(chunk)
    for _ in range(new):
        for run in runs.values():
            run.step()
    return {
        name: Timing(prefill[name], statistics.median(run.seconds), run.nbytes, chunked[name])
        for name, run in runs.items()
    }


def side_by_side(model: PreTrainedModel, ids: Tensor, args: argparse.Namespace) -> Table:
    """All recipes against the stock cache, `args.rounds` times."""
    recipes = [FLOOR, STOCK, *args.recipe]
    rounds = [one_round(model, recipes, ids, args.new, args.chunk) for _ in range(args.rounds)]
    table = Table(
        title=f"{ids.shape[1]:,} tokens + {args.new}, {args.threads} thread(s), "
        f"{args.rounds} rounds, {args.dtype}"
    )
    titles = ["cache", "prefill s", "x stock", "ms a token", "speed x stock", "avoided", "bytes"]
    titles += [] if args.chunk is None else [f"chunks of {args.chunk} / one piece"]
    for column in titles:
        left = column == "cache"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)

    def median(figure: str, recipe: str) -> float:
        return statistics.median(getattr(one[recipe], figure) for one in rounds)

    for recipe in recipes[1:]:
        pairs = [(one[recipe], one[STOCK], one[FLOOR]) for one in rounds]
        avoided = statistics.median(
            (s.token - r.token) / (s.token - f.token) if s.token > f.token else float("nan")
            for r, s, f in pairs
        )
        cells = [
            recipe,
            f"{median('prefill', recipe):.2f}",
            f"{statistics.median(r.prefill / s.prefill for r, s, _ in pairs):.2f}",
            f"{1e3 * median('token', recipe):.1f}",
            f"{statistics.median(s.token / r.token for r, s, _ in pairs):.2f}",
            f"{avoided:.2f}" if ids.shape[1] > FLOOR_TOKENS else "-",
            f"{rounds[-1][recipe].nbytes / rounds[-1][STOCK].nbytes:.3f}",
        ]
        if args.chunk is not None:
            cells.append(f"{statistics.median(r.chunked / r.prefill for r, _, _ in pairs):.2f}")
        table.add_row(*cells)
    table.caption = f"floor, {FLOOR_TOKENS} tokens: {1e3 * median('token', FLOOR):.1f} ms a token"
    return table


@torch.no_grad()
def early_and_late(model: PreTrainedModel, ids: Tensor, args: argparse.Namespace) -> Table:
    """Cost per token around token 200 and around token 2,000 of decoding."""
    table = Table(title=f"{ids.shape[1]:,} tokens, then 2,100 decoded; median ms a token")
    for column in ("cache", "tokens 150-250", "tokens 1,950-2,050", "late / early"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for recipe in args.recipe:
        run = Run(model, recipe, ids)
        run.prefill()
        for _ in range(2100):
            run.step()
        early, late = (statistics.median(run.seconds[a : a + 100]) for a in (150, 1950))
        table.add_row(recipe, f"{early * 1e3:.1f}", f"{late * 1e3:.1f}", f"{late / early:.2f}")
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, action="append", help="prompt tokens; repeatable")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, help="tokens a chunk, to time prefill in chunks too")
    parser.add_argument("--long", action="store_true", help="cost per token early and late instead")
    parser.add_argument("--recipe", action="append", default=None)
    args = parser.parse_args()
    args.recipe = args.recipe or ["full", "buzz@0.4", "h2o@0.4", "streaming_llm@0.4"]
    torch.set_num_threads(args.threads)
    model, _ = kvhive.load(args.model, dtype=args.dtype, device=args.device)
    for length in args.prompt or [4096]:
        source = torch.Generator().manual_seed(0)
        ids = torch.randint(100, model.config.vocab_size - 100, (1, length), generator=source)
        measure = early_and_late if args.long else side_by_side
        Console(width=100).print(measure(model, ids.to(model.device), args))


if __name__ == "__main__":
    main()
