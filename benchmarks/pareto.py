"""Fidelity against real bytes, of whole recipes: stores, policies, and their products.

    KVHIVE_DATA=path/to/data python benchmarks/pareto.py --out docs/results/stores
    KVHIVE_DATA=path/to/data python benchmarks/pareto.py --rank 1 --recipe small --out other_texts

Texts, steps and measures are those of `fidelity.py`, agnostic: 2,048 tokens are read and compressed
before any of the next 256 is seen, which are fed in one step that evicts nothing. `--rank 1` takes
the second longest text of every set instead of the longest, for recipes that were chosen on those.
`transformers(bits=4)` is transformers' own quantised cache (quanto; left out where that is not
installed), with the same number of exact tokens. Results are appended to OUT.jsonl run by run; a
run that was stopped goes on. At the end the table OUT.table.md and the figure OUT.svg are written.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from fidelity import TEXTS, compare, log_probs, read_results
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

import kvhive
from kvhive.memory import storage_bytes

GROUPS = {
    "exact": ["h2o@0.4", "h2o@0.25", "kvzip@0.4", "hive@0.6", "hive@0.4", "hive@0.25", "hive@0.1"],
    "bits": [
        *(f"full+kivi(bits={bits})" for bits in (8, 4, 3, 2)),
        "full+kivi(key_bits=4, value_bits=2)",
        *(f"full+rotated(bits={bits})" for bits in (8, 4, 3, 2)),
    ],
    "eviction x bits": [
        "h2o@0.4+rotated",
        "buzz@0.4+rotated",
        "scissorhands@0.2+rotated",
        "snapkv@0.4+kivi",
        "hive@0.6+rotated",
        "hive@0.4+kivi",
        "hive@0.35+kivi",
    ],
    "tiers": [
        "hive@0.8+tiers(share=0.4)",
        "hive@0.6+tiers(share=0.3)",
        "hive@0.5+tiers(share=0.25)",
        "hive@0.45+tiers(share=0.2)",
        "kvzip@0.45+tiers(share=0.2)",
        "hive@0.35+tiers(share=0.1)",
        "hive@0.2+tiers(share=0.1, residual=16)",
    ],
    "other forms": ["full+think", "full+think(value_bits=4)", "full+kvsharer", "h2o@0.1+less"],
    "transformers": [f"transformers(bits={bits})" for bits in (4, 2)],
}
SINKS_AND_TAIL = 36  # tokens that kvhive's own stores leave exact


def read_texts(rank: int) -> dict[str, str]:
    """The text of that rank by length of each set below $KVHIVE_DATA."""
    root = os.environ.get("KVHIVE_DATA")
    if not root:
        raise SystemExit("set KVHIVE_DATA to the evaluation data")
    texts = {}
    for name, (file, field) in TEXTS.items():
        with gzip.open(Path(root) / file, "rt") as lines:
            found = sorted((str(json.loads(line)[field]) for line in lines), key=len)
        texts[f"{name} {rank}" if rank else name] = found[-1 - rank]
    return texts


@torch.no_grad()
def of_transformers(
    model: PreTrainedModel, ids: Tensor, prefix: int, bits: int
) -> tuple[Tensor, int]:
    """What transformers' quantised cache predicts, and the bytes it holds after the prompt."""
    cache = QuantizedCache(
        "quanto", model.config, nbits=bits, q_group_size=32, residual_length=SINKS_AND_TAIL
    )
    model(ids[:, :prefix], past_key_values=cache)
    held = storage_bytes([_tensors(vars(layer)) for layer in cache.layers])
    logits = model(ids[:, prefix:-1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1), held


def _tensors(values: Any) -> list[Any]:
    """All tensors within, quanto's wrappers opened."""
    found: list[Any] = []
    for value in values.values():
        if hasattr(value, "_data"):
            found += [value._data, value._scale, value._shift]
        elif isinstance(value, Tensor):
            found.append(value)
    return [getattr(one, "_data", one) for one in found]


def measure(args: argparse.Namespace) -> None:
    """Append a line for every text and recipe that is not there yet."""
    torch.set_num_threads(1)
    model, tokenizer = kvhive.load(args.model, dtype=args.dtype)
    log = args.out.with_suffix(".jsonl")
    done = {(row["text"], row["recipe"]) for row in read_results(log)}
    for name, text in read_texts(args.rank).items():
        length = args.prefix + args.scored
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
        if ids.shape[1] < length:
            raise SystemExit(f"text {name!r} has {ids.shape[1]} tokens, {length} are needed")
        missing = [recipe for recipe in wanted(args) if (name, recipe) not in done]
        if not missing:
            continue
        full, report = log_probs(model, ids, args.prefix, "full")
        for recipe in track(missing, name):
            if recipe.startswith("transformers"):
                bits = int(recipe.partition("=")[2].rstrip(")"))
                other, held = of_transformers(model, ids, args.prefix, bits)
                share = held / report.full_nbytes
            else:
                other, held_report = log_probs(model, ids, args.prefix, recipe)
                share = held_report.nbytes / held_report.full_nbytes
            row = {"text": name, "recipe": recipe, "bytes": share}
            row |= compare(full, other, ids[0, args.prefix + 1 :])
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")


def wanted(args: argparse.Namespace) -> list[str]:
    """The recipes asked for, or all groups."""
    if args.recipe:
        return list(args.recipe)
    recipes = [recipe for group in GROUPS.values() for recipe in group]
    if find_spec("optimum") is None:
        print("transformers' quantised cache is left out: optimum-quanto is not installed")
        return [recipe for recipe in recipes if not recipe.startswith("transformers")]
    return recipes


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every recipe over the texts; `spread` is the standard error of the KL."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"]].append(row)
    keys = ("bytes", "kl", "trimmed", "top1", "delta_nll")
    found = {}
    for recipe, group in groups.items():
        each = {key: fmean(row[key] for row in group) for key in keys}
        spread = [row["kl"] for row in group]
        each["spread"] = stdev(spread) / len(spread) ** 0.5 if len(spread) > 1 else 0.0
        found[recipe] = each
    return found


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Markdown, by bytes."""
    yield "| recipe | bytes | of the full cache | KL (standard error) | trimmed | top-1 |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for recipe, mean in sorted(found.items(), key=lambda pair: -pair[1]["bytes"]):
        yield (
            f"| `{recipe}` | {mean['bytes']:.3f} | 1/{1 / mean['bytes']:.1f} | {mean['kl']:.4f} "
            f"({mean['spread']:.4f}) | {mean['trimmed']:.4f} | {mean['top1']:.3f} |"
        )


def plot(found: dict[str, dict[str, float]], file: Path) -> None:
    """KL against bytes, a colour a group."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6))
    for group, recipes in GROUPS.items():
        points = sorted((found[r]["bytes"], found[r]["kl"], r) for r in recipes if r in found)
        if points:
            axis.scatter([p[0] for p in points], [p[1] for p in points], label=group, s=28)
            for size, kl, recipe in points:
                axis.annotate(
                    recipe, (size, kl), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
    axis.set(
        xlabel="bytes held / full cache",
        ylabel="KL to the full cache (nats a token)",
        xscale="log",
        yscale="log",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", action="append", help="default: all that the table has")
    parser.add_argument("--rank", type=int, default=0, help="0: the longest text of each set")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("stores"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measure(args)
    found = means(read_results(args.out.with_suffix(".jsonl")))
    lines = "\n".join(table(found)) + "\n"
    args.out.with_suffix(".table.md").write_text(lines)
    plot(found, args.out.with_suffix(".svg"))
    print(lines)


if __name__ == "__main__":
    main()
