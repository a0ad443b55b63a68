"""Every knob of every method at its extremes, as a recipe that reads and decodes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.adversary.case import Case
from kvhive.allocations import ALLOCATIONS
from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.generation import decode, read
from kvhive.policies import POLICIES
from kvhive.recipe import Recipe
from kvhive.stores import STORES
from tests.cli.tiny import model

VALUES = (
    *("0", "1", "3", "1000000", str(2**31 - 1), str(2**63), "1" + "0" * 30, "-1", "nan", "inf"),
    *("0.5", "1e308", "true", "none", "''", "[]", "[1]", "[0, 2147483647]", "'x' * 9"),
)
BUDGETS = ("@40", "@0.4", "")


def cases() -> Iterator[Case]:
    """A case for every knob, value and kind of budget that the method takes."""
    for name, policy in POLICIES.items():
        budgets = BUDGETS[:2] if policy().sizing.budgeted else BUDGETS[2:]
        for knob in policy.knobs():
            for place, value in enumerate(VALUES):
                budget = budgets[place % len(budgets)]
                text = f"{name}({knob.name}={value}){budget}"
                yield Case(text, lambda text=text: lives(text))
    for kind, registry in (("/", ALLOCATIONS), ("+", STORES)):
        for name, member in registry.items():
            for knob in member.knobs():
                for value in VALUES:
                    text = f"h2o@40{kind}{name}({knob.name}={value})"
                    yield Case(text, lambda text=text: lives(text))


def lives(text: str) -> int:
    """Read 70 tokens in chunks, decode 6."""
    torch.set_num_threads(1)
    network = model()
    cache = HiveCache.for_model(network, Recipe.parse(text))
    logits = read(network, cache, list(range(70)), 30)
    for _ in decode(network, cache, logits, 6):
        pass
    return 0
