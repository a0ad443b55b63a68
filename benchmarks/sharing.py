"""KVSharer's claim: layers that share by its search, by likeness and at random, at equal bytes.

    KVHIVE_DATA=path/to/data python benchmarks/sharing.py --layers 4 --layers 8

Read as `benchmarks/fidelity.py --mode agnostic` reads, with the map of the profile that comes with
kvhive (or of `--profile`), with that of as many pairs whose keys and values are most alike, and
with `--draws` random maps. Prints KL from the full cache and top-1 agreement, means over the texts.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from fidelity import compare, read_texts
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

import kvhive
from kvhive.calibration import Profile
from kvhive.calibration.shipped import shipped
from kvhive.stores.kvsharer import pairs_of

Pair = tuple[int, int]


def alike(distance: Tensor, count: int) -> list[Pair]:
    """The least distant pairs, each layer sharing once."""
    layers = range(len(distance))
    order = sorted((float(distance[i, j]), i, j) for i in layers for j in range(i))
    found: dict[int, int] = {}
    for _, later, earlier in order:
        if len(found) < count:
            found.setdefault(later, earlier)
    return list(found.items())


def drawn(layers: int, count: int, seed: int) -> list[Pair]:
    """Random pairs, each layer sharing once."""
    draw = random.Random(seed)
    return [(later, draw.randrange(later)) for later in draw.sample(range(1, layers), count)]


def maps(profile: Profile, counts: list[int], draws: int) -> dict[tuple[int, str], list[Pair]]:
    """Pairs by how many layers share, and by whose choice it is."""
    distance = profile.tensors["distance"]
    found: dict[tuple[int, str], list[Pair]] = {}
    for count in counts:
        found[count, "searched"] = pairs_of(profile)[:count]
        found[count, "most alike"] = alike(distance, count)
        for seed in range(draws):
            found[count, f"random {seed}"] = drawn(len(distance), count, seed)
    return found


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, ids: Tensor, prefix: int, recipe: str, profile: Profile | None
) -> tuple[Tensor, kvhive.Report]:
    """As `fidelity.log_probs`, with a profile."""
    cache = kvhive.HiveCache.for_model(model, recipe, profile)
    cache.read(ids[:, :prefix])
    report = cache.report()
    logits = model(ids[:, prefix:-1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1), report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile", type=Path, help="default: the one that comes with kvhive")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--layers", type=int, action="append", help="that share; default: 1 2 4 8")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kvhive.load(args.model, dtype=args.dtype)
    profile = Profile.load(args.profile) if args.profile else shipped("kvsharer")[0]
    tried = maps(profile, args.layers or [1, 2, 4, 8], args.draws)
    rows = defaultdict(list)
    for name, text in read_texts(args.text).items():
        length = args.prefix + args.scored
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
        full, _ = log_probs(model, ids, args.prefix, "full", None)
        for (count, choice), pairs in track(tried.items(), name):
            made = {"pairs": torch.tensor(pairs), "similarity": torch.zeros(count)}
            given = replace(profile, tensors={**profile.tensors, **made})
            recipe = f"full+kvsharer(layers={count})"
            other, report = log_probs(model, ids, args.prefix, recipe, given)
            row = compare(full, other, ids[0, args.prefix + 1 :])
            rows[count, choice].append(row | {"bytes": report.nbytes / report.full_nbytes})
    print("| layers | chosen | bytes | KL | trimmed | top-1 |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for (count, choice), each in rows.items():
        keys = ("bytes", "kl", "trimmed", "top1")
        cells = " | ".join(f"{fmean(row[key] for row in each):.3f}" for key in keys)
        print(f"| {count} | {choice} | {cells} |")


if __name__ == "__main__":
    main()
