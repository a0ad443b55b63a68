"""Recipes that stand for every policy in the registry; a new one is covered without a line here.

Of allocations there is a sample, of those that need to know nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvhive.allocations import Allocation, Facts
from kvhive.allocations._rounding import apportion
from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.policies import POLICIES, Policy
from kvhive.recipe import Recipe

BUDGET = 48
VARIANTS = {
    "buzz": (
        "buzz(variant=no_max)",
        "buzz(variant=fast)",
        "buzz(prefill=streamed)",
        "buzz(positions=original)",
    ),
    "cascading": ("cascading(levels=3, strides=[1, 3, 5], reduce=mean, eager_fill=false)",),
    "corm": ("corm(history=11, recent=7, threshold=cache)",),
    "hive": ("hive(cell=4, pool=1)", "hive(reconstruct=false)"),
    "scissorhands": ("scissorhands(history=20, recent=7, drop=5, threshold=cache)",),
    "scissorhands_percentile": ("scissorhands_percentile(history=20, recent=7, start=30)",),
    "snapkv": ("snapkv(group_reduce=max, pooling=max)", "snapkv(decode=none)"),
}
ALLOCATED = (
    "snapkv/ada",
    "snapkv(decode=none)/ada(normalize=false)",
    "h2o/global",
    "buzz/global",
    "buzz/pyramid",
    "tova/pyramid",
)
ALWAYS_KEPT = {"sink": 3, "window": 7, "recent": 7}


def with_budget(budget: int | float) -> list[str]:
    """Every policy, its variants and the sample of allocations, at a budget; its least one where
    `budget` is too small.
    """
    recipes = []
    for spelled in spelled_policies():
        policy, slash, allocation = spelled.partition("/")
        if not POLICIES[policy.partition("(")[0]]().sizing.budgeted:
            recipes.append(spelled)
            continue
        least = Recipe.parse(f"{policy}@100000").policy.sizing.least
        wanted = max(budget, least) if isinstance(budget, int) else budget
        recipes.append(f"{policy}@{wanted}{slash}{allocation}")
    return recipes


def spelled_policies() -> list[str]:
    """Every policy, each before its variants, and the sample of allocations."""
    policies = [spelled for name in POLICIES for spelled in (name, *VARIANTS.get(name, ()))]
    return [*policies, *ALLOCATED]


SMALL = with_budget(BUDGET)
WHOLE = with_budget(100_000)
SHARES = [recipe for recipe in with_budget(0.4) if "@" in recipe]
LARGE_SHARES = [recipe for recipe in with_budget(0.9) if "@" in recipe]
SELECTIVE = [recipe for recipe in SMALL if "@" in recipe]


@dataclass(frozen=True)
class Slanted(Allocation):
    """Fixed shares that fall from head to head and from layer to layer."""

    name: ClassVar[str] = "slanted"

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base."""
        weights = torch.arange(facts.layers * facts.kv_heads, 0, -1)
        total = budget * facts.layers * facts.kv_heads
        return apportion(weights.view(facts.layers, -1), total, floor)


def slanted(recipe: str) -> Recipe | None:
    """The recipe with heads that may hold different numbers, 64 on average; None if its policy
    shares out by itself.
    """
    parsed = guarding(recipe) or Recipe.parse(recipe)
    if parsed.policy.granularity == "model":
        return None
    return replace(parsed, allocation=Slanted(), budget=Budget(tokens=64))


def with_slack(recipe: str, slack: int) -> Recipe:
    """The recipe with so many tokens freed beyond need; 0 evicts at every step."""
    return replace(Recipe.parse(recipe), slack=slack)


def guarding(recipe: str) -> Recipe | None:
    """The recipe with small sinks and windows spelled out; None if its policy knows neither."""
    parsed = Recipe.parse(recipe)
    knobs = {f.name: ALWAYS_KEPT[f.name] for f in fields(parsed.policy) if f.name in ALWAYS_KEPT}
    return replace(parsed, policy=replace(parsed.policy, **knobs)) if knobs else None


def limit(policy: Policy, budget: int, decoded: int) -> int:
    """The most a head may hold `decoded` tokens after its last prompt."""
    grown = 0 if policy.sizing.decoding else decoded
    return policy.sizing.peak(budget) + grown


def fullest(recipe: str | Recipe, kept: Tensor) -> float:
    """What the budget bounds, of tokens kept `[layers, rows, heads]`: the fullest head of any row;
    where heads share, their mean over the layer or over the model.
    """
    return float(_by_share(recipe, kept).max())


def emptiest(recipe: str | Recipe, kept: Tensor) -> float:
    """As `fullest`, of what holds least."""
    return float(_by_share(recipe, kept).min())


def _by_share(recipe: str | Recipe, kept: Tensor) -> Tensor:
    parsed, kept = Recipe.parse(recipe), kept.double()
    if parsed.allocation.compete == "layer":
        return kept.mean(-1)
    if parsed.policy.granularity == "model" or parsed.allocation != Uniform():
        return kept.mean((0, 2))
    return kept
