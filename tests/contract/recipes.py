"""Recipes that stand for every policy in the registry; a new one is covered without a line here."""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor

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
    "scissorhands": ("scissorhands(history=20, recent=7, drop=5, threshold=cache)",),
    "scissorhands_percentile": ("scissorhands_percentile(history=20, recent=7, start=30)",),
    "snapkv": ("snapkv(group_reduce=max, pooling=max)", "snapkv(decode=none)"),
}
ALWAYS_KEPT = {"sink": 3, "window": 7, "recent": 7}


def with_budget(budget: int | float) -> list[str]:
    """Every policy, and its variants, at a budget; its least one where `budget` is too small."""
    recipes = []
    for name, policy in POLICIES.items():
        for spelled in (name, *VARIANTS.get(name, ())):
            if not policy().sizing.budgeted:
                recipes.append(spelled)
                continue
            least = Recipe.parse(f"{spelled}@100000").policy.sizing.least
            wanted = max(budget, least) if isinstance(budget, int) else budget
            recipes.append(f"{spelled}@{wanted}")
    return recipes


SMALL = with_budget(BUDGET)
WHOLE = with_budget(100_000)
SHARES = [recipe for recipe in with_budget(0.4) if "@" in recipe]
LARGE_SHARES = [recipe for recipe in with_budget(0.9) if "@" in recipe]
SELECTIVE = [recipe for recipe in SMALL if "@" in recipe]


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


def fullest(recipe: Recipe, kept: Tensor) -> float:
    """What the budget bounds, of tokens kept `[layers, rows, heads]`: the fullest head of any row.

    Where heads compete, the budget bounds the mean of those that do.
    """
    compete = recipe.allocation.compete
    if "model" in (recipe.policy.granularity, compete):
        return float(kept.double().mean((0, 2)).max())
    return float((kept.double().mean(2) if compete == "layer" else kept).max())
