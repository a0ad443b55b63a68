"""How far each recipe drifts from the full cache: KL divergence, top-1 agreement and delta NLL.

    KVHIVE_DATA=path/to/data python benchmarks/fidelity.py --out docs/results/fidelity
    python benchmarks/fidelity.py --text one.txt --text two.txt --policy buzz --budget 0.4

Each text is read for `--prefix` tokens and the next `--scored` tokens are fed in one step that
evicts nothing, with the full cache and with every recipe. `agnostic`: the cache is compressed
before any of the continuation is seen. `aware`: the first 32 tokens of the continuation belong to
the prompt, as a question would. `trimmed` leaves out the hundredth of the tokens with the largest
KL: one surprising token can carry a mean. Results are appended to OUT.jsonl run by run, so a run
that was stopped goes on where it was; at the end the table OUT.md and the plot OUT.svg are written.
`--jobs 2` splits the recipes over two processes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

import kvhive
from kvhive.policies import POLICIES

QUESTION = 32  # tokens of the continuation that an `aware` prompt includes
TEXTS = {
    "wikitext": ("wikitext2/test_articles.jsonl.gz", "text"),
    "book": ("books/books.jsonl.gz", "text"),
    "news": ("multi_news/longbench_subset.jsonl.gz", "article"),
}
MODES = ("agnostic", "aware")
BUZZ_VARIANTS = ("buzz(variant=no_max)", "buzz(preset=paper)")


def read_texts(files: list[Path]) -> dict[str, str]:
    """The files given, or one long text of each of three sets below $KVHIVE_DATA."""
    if files:
        return {file.stem: file.read_text() for file in files}
    root = os.environ.get("KVHIVE_DATA")
    if not root:
        raise SystemExit("set KVHIVE_DATA to the evaluation data, or name texts with --text FILE")
    texts = {}
    for name, (file, field) in TEXTS.items():
        with gzip.open(Path(root) / file, "rt") as lines:
            texts[name] = max((str(json.loads(line)[field]) for line in lines), key=len)
    return texts


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, ids: Tensor, prefix: int, recipe: str
) -> tuple[Tensor, kvhive.Report]:
    """float32 `[scored - 1, vocabulary]`: predictions of the tokens after the first scored one."""
    cache = kvhive.HiveCache.for_model(model, recipe)
    cache.read(ids[:, :prefix])
    report = cache.report()
    with cache.freeze():
        logits = model(ids[:, prefix:-1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1), report


def compare(full: Tensor, other: Tensor, target: Tensor) -> dict[str, float]:
    """KL(full || other) in nats as mean and trimmed mean, top-1 agreement, and rise of the true
    tokens' NLL.
    """
    each = (full.exp() * (full - other)).sum(-1).sort().values
    rise = (full - other).gather(-1, target[:, None])
    return {
        "kl": each.mean().item(),
        "trimmed": each[: len(each) - len(each) // 100].mean().item(),
        "top1": (full.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "delta_nll": rise.mean().item(),
    }


def recipes(args: argparse.Namespace) -> list[str]:
    """Every policy (and BUZZ's variants) at every budget; methods without one as they are."""
    names = args.policy or [*(n for n in POLICIES if n != "full"), *BUZZ_VARIANTS]
    parts = [name.partition("/") for name in names]
    return [
        f"{policy}@{budget}{slash}{allocation}"
        for policy, slash, allocation in parts
        for budget in args.budget
    ]


def measure(args: argparse.Namespace) -> None:
    """Append a line for every text, mode and recipe that is not there yet."""
    torch.set_num_threads(1)
    model, tokenizer = kvhive.load(args.model, dtype=args.dtype)
    log = args.out.with_suffix(".jsonl")
    done = {tuple(r[k] for k in ("text", "mode", "recipe")) for r in read_results(log)}
    todo = recipes(args)[args.part :: args.jobs]
    for name, text in read_texts(args.text).items():
        length = args.prefix + QUESTION + args.scored
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
        if ids.shape[1] < length:
            raise SystemExit(f"text {name!r} has {ids.shape[1]} tokens, {length} are needed")
        for mode in args.mode:
            extra = QUESTION if mode == "aware" else 0
            missing = [recipe for recipe in todo if (name, mode, recipe) not in done]
            if not missing:
                continue
            used = ids[:, : args.prefix + extra + args.scored]
            full, _ = log_probs(model, used, args.prefix + extra, "full")
            for recipe in track(missing, f"{name}, {mode}", disable=args.part > 0):
                other, report = log_probs(model, used, args.prefix + extra, recipe)
                row = {"text": name, "mode": mode, "recipe": recipe, "kept": report.tokens_kept}
                row |= {"bytes": report.nbytes / report.full_nbytes}
                row |= compare(full, other, used[0, args.prefix + extra + 1 :])
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read_results(log: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summarise(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """(policy, budget, mode) -> means over the texts."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        policy, _, rest = row["recipe"].rpartition("@")
        budget, slash, allocation = rest.partition("/")
        groups[policy + slash + allocation, budget, row["mode"]].append(row)
    keys = ("kept", "bytes", "kl", "trimmed", "top1", "delta_nll")
    return {k: {key: fmean(r[key] for r in group) for key in keys} for k, group in groups.items()}


def write_table(means: dict[tuple[str, str, str], dict[str, float]], file: Path) -> None:
    """Markdown: one row a policy and mode, bytes, KL, trimmed KL and top-1 at each budget."""
    budgets = sorted({budget for _, budget, _ in means}, key=float)
    lines = [
        "| policy | mode | "
        + " | ".join(f"{b}: bytes / KL / trimmed / top-1" for b in budgets)
        + " |",
        "| --- | --- |" + " ---: |" * len(budgets),
    ]
    best = min(budgets, key=lambda b: abs(float(b) - 0.25))
    pairs = sorted(
        {(p, m) for p, _, m in means},
        key=lambda pair: (pair[1], means.get((pair[0], best, pair[1]), {"kl": 9.0})["kl"]),
    )
    for policy, mode in pairs:
        cells = []
        for budget in budgets:
            cells.append(_cell(means.get((policy, budget, mode))))
        lines.append(f"| `{policy}` | {mode} | " + " | ".join(cells) + " |")
    file.write_text("\n".join(lines) + "\n")


def _cell(mean: dict[str, float] | None) -> str:
    if mean is None:
        return "-"
    return f"{mean['bytes']:.2f} / {mean['kl']:.4f} / {mean['trimmed']:.4f} / {mean['top1']:.2f}"


def plot(means: dict[tuple[str, str, str], dict[str, float]], file: Path) -> None:
    """KL against measured bytes, a panel for each mode; allocations are left to the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in MODES if any(mode == m for _, _, m in means)]
    figure, grid = plt.subplots(
        1, len(modes), figsize=(8 * len(modes), 6), sharey=True, squeeze=False
    )
    axes, means = grid[0], {key: mean for key, mean in means.items() if "/" not in key[0]}
    policies = sorted({policy for policy, _, _ in means})
    styles = [(c, m) for m in "osv" for c in plt.get_cmap("tab10").colors]
    for axis, mode in zip(axes, modes, strict=True):
        for policy, (colour, marker) in zip(policies, styles, strict=False):
            means_here = [v for (p, _, m), v in means.items() if (p, m) == (policy, mode)]
            if not means_here:
                continue
            points = sorted((mean["bytes"], mean["kl"]) for mean in means_here)
            wide = 2.6 if policy.startswith("buzz") else 1.2
            axis.plot(
                *zip(*points, strict=True), marker=marker, color=colour, lw=wide, label=policy
            )
        axis.set(title=mode, xlabel="bytes held / full cache", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL to the full cache (nats a token)")
    axes[-1].legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument(
        "--policy", action="append", help="policy with knobs, and /allocation; default: all"
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="default: both")
    parser.add_argument("--budget", action="append", help="share; default: 0.1 0.25 0.4 0.6")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("fidelity"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.mode = args.mode or list(MODES)
    args.budget = args.budget or ["0.1", "0.25", "0.4", "0.6"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        measure(args)
        return
    others = [
        subprocess.Popen([sys.executable, *sys.argv, "--part", str(part)])
        for part in range(1, args.jobs)
    ]
    args.part = 0
    measure(args)
    if any(process.wait() for process in others):
        raise SystemExit("a process failed; run the same command again to go on")
    means = summarise(read_results(args.out.with_suffix(".jsonl")))
    write_table(means, args.out.with_suffix(".md"))
    plot(means, args.out.with_suffix(".svg"))
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
