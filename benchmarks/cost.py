"""What each policy costs: prefill time against the full cache, and its share of a layer's decoding.

    python benchmarks/cost.py --prompt 4096 --budget 1024 --new 128 --rounds 3
    python benchmarks/cost.py --recipe h2o --recipe "snapkv(window=64)"
    python benchmarks/cost.py --shape 2048,32,8,2                           # as wide as a 1B model

Both are ratios of runs made side by side, in CPU seconds of the process, which a busy machine
disturbs less than the clock on the wall; each figure is a median over rounds.

*Prefill*: seconds to read the prompt, over those of `full` (kvhive's own path without a policy) run
right before it.

*Decoding*: the cache has come down to its budget and has decoded `--new` tokens. Then it and a full
cache of the same size (on average over what follows) take turns, token by token. The overhead is
what an attention block of the model (projections, rotary embedding, cache and attention, as
transformers calls it) takes longer than the same block with the full cache, over what that takes.
Beside it, for those who look closer, the same of kvhive's part of the block alone: appending,
attention, votes, eviction. Evictions come once in many tokens and are spread over all of them, so
`--new` should cover some: 33 tokens lie between two of most policies at a budget of 1,024, some 560
between two events of BUZZ. Where positions are counted in the cache, an eviction also turns the
keys it has moved, which is part of the overhead; the same policy with `positions=original` stands
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fidelity import BUZZ_VARIANTS
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvhive
from kvhive.cli.needs import needs_text
from kvhive.kernels import Needs
from kvhive.policies import POLICIES

DECODE_BOUND = 0.15  # of a layer's attention block


@dataclass(frozen=True)
class Decoding:
    """CPU seconds a decoded token, of all layers: in attention blocks, and in the cache's part."""

    blocks: float
    cache: float


@dataclass(frozen=True)
class Cost:
    """One round of one recipe; prefill in CPU seconds."""

    prefill: float
    full_prefill: float
    decoding: Decoding
    full_decoding: Decoding
    held: float


class Stopwatch:
    """Adds up the CPU seconds of the calls it is wrapped around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def run(*arguments: Any, **settings: Any) -> Any:
            start = time.process_time()
            result = step(*arguments, **settings)
            self.seconds += time.process_time() - start
            return result

        return run


class Clock:
    """Times the steps of one run: the model's attention blocks and the cache's layers in them."""

    def __init__(self, run: Run) -> None:
        self.run, self.blocks, self.cache = run, Stopwatch(), Stopwatch()
        for layer in run.cache.hive_layers():
            for step in ("update", "attend"):
                setattr(layer, step, self.cache.around(getattr(layer, step)))
        self.modules = [module for module in run.model.modules() if is_attention(module)]

    def step(self) -> None:
        """Decode a token, timed; the model is left as it was."""
        for module in self.modules:
            module.forward = self.blocks.around(module.forward)
        self.run.step()
        for module in self.modules:
            del module.forward

    def per_token(self, tokens: int) -> Decoding:
        """Seconds of the steps so far, divided by `tokens`."""
        return Decoding(self.blocks.seconds / tokens, self.cache.seconds / tokens)


def is_attention(module: torch.nn.Module) -> bool:
    """Whether transformers gave this module a layer's cache to attend to."""
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")


class Run:
    """A cache that has read a prompt and decodes on."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, recipe: str, ids: Tensor) -> None:
        self.model, self.cache = model, kvhive.HiveCache.for_model(model, recipe)
        start = time.process_time()
        logits = model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.prefill = time.process_time() - start
        self.token = logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step(self) -> float:
        """Decode a token; tokens held by a head afterwards, on average."""
        logits = self.model(self.token, past_key_values=self.cache).logits
        self.token = logits[:, -1:].argmax(-1)
        counts = [layer.slots.tally.double().mean() for layer in self.cache.hive_layers()]
        return float(torch.stack(counts).mean())


def measure(model: PreTrainedModel, recipe: str, ids: Tensor, new: int) -> Cost:
    """Prefill `full` and the recipe; decode with the recipe and a full cache of its size."""
    full_prefill = Run(model, "full", ids).prefill
    run = Run(model, recipe, ids)
    held = statistics.fmean(run.step() for _ in range(new))
    plain = Run(model, "full", ids[:, : max(1, round(held) - new // 2)])
    plain.step()  # makes room to grow
    clock, full_clock = Clock(run), Clock(plain)
    for _ in range(new):
        clock.step()
        full_clock.step()
    decoding, full_decoding = clock.per_token(new), full_clock.per_token(new)
    return Cost(run.prefill, full_prefill, decoding, full_decoding, held)


def prefill_bound(needs: Needs) -> float:
    """The most a prefill may take, over the full cache's, by what is asked of attention."""
    if needs.columns is not None:
        return 1.3
    return 1.1 if needs.last_rows else 1.05


def table(costs: dict[str, list[Cost]]) -> str:
    """Markdown, one row a recipe; figures over their bound are marked."""
    titles = ("recipe", "needs", "held", "prefill x full", "bound", "attention, ms a token")
    titles += ("of a full cache of that size", f"overhead (bound {DECODE_BOUND:.0%})")
    titles += ("of the cache's part",)
    lines = ["| " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * 7]
    for recipe, rounds in costs.items():
        needs = kvhive.Recipe.parse(recipe).policy.needs
        prefill = statistics.median(cost.prefill / cost.full_prefill for cost in rounds)
        blocks = [(cost.decoding.blocks, cost.full_decoding.blocks) for cost in rounds]
        cache = [(cost.decoding.cache, cost.full_decoding.cache) for cost in rounds]
        overhead = statistics.median(ours / full - 1 for ours, full in blocks)
        inner = statistics.median(ours / full - 1 for ours, full in cache)
        bound = prefill_bound(needs)
        cells = [
            f"`{recipe}`",
            needs_text(needs),
            f"{statistics.median(cost.held for cost in rounds):,.0f}",
            f"{prefill:.3f}{' !' if prefill > bound else ''}",
            f"{bound:.2f}",
            f"{1e3 * statistics.median(ours for ours, _ in blocks):.2f}",
            f"{1e3 * statistics.median(full for _, full in blocks):.2f}",
            f"{overhead:+.1%}{' !' if overhead > DECODE_BOUND else ''}",
            f"{inner:+.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def every_policy() -> list[str]:
    """All policies; also without the price of positions counted in the cache, where they do so."""
    names = [name for name in POLICIES if name != "full"]
    turning = [name for name in names if POLICIES[name].positions == "cache"]
    named = [*names, *BUZZ_VARIANTS, *(f"{name}(positions=original)" for name in turning)]
    return list(dict.fromkeys(named))


def shaped(shape: str, dtype: str) -> PreTrainedModel:
    """A Llama of random weights, "hidden,heads,kv_heads,layers": as wide as a larger model, but
    shallow.
    """
    try:
        hidden, heads, kv_heads, layers = map(int, shape.split(","))
    except ValueError:
        raise SystemExit(f"--shape: expected hidden,heads,kv_heads,layers, got {shape!r}") from None
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", help="hidden,heads,kv_heads,layers: a random Llama instead")
    parser.add_argument("--prompt", type=int, default=4096, help="prompt tokens")
    parser.add_argument("--budget", default="1024", help="of recipes that name none")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode, twice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", action="append", help="with knobs; default: every policy")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    named = args.recipe or every_policy()
    recipes = [name if "@" in name else f"{name}@{args.budget}" for name in named]
    if args.shape:
        model = shaped(args.shape, args.dtype)
    else:
        model, _ = kvhive.load(args.model, dtype=args.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size - 100, (1, args.prompt), generator=generator)
    Run(model, "full", ids[:, :64])  # what is done once is not counted
    costs: dict[str, list[Cost]] = {recipe: [] for recipe in recipes}
    for number in range(args.rounds):
        for recipe in track(recipes, f"round {number + 1} of {args.rounds}"):
            costs[recipe].append(measure(model, recipe, ids, args.new))
    what = f"{args.shape or args.model}: {args.prompt:,} tokens + {args.new}"
    print(f"{what}, {args.threads} thread(s), {args.rounds} round(s)\n")
    print(table(costs))


if __name__ == "__main__":
    main()
