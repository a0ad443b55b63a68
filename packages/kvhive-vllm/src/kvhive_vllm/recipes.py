"""Recipes that an engine with one length for a request can run; all others are refused by name."""

from __future__ import annotations

from kvhive.lengths import policies_of
from kvhive.recipe import Recipe
from kvhive.stores.dense import Dense

KEY = "kvhive"  # of vLLM's `additional_config`
SCHEDULER = "kvhive_vllm.scheduler.HiveScheduler"
WORKER = "kvhive_vllm.worker.HiveWorker"


def read(text: str | Recipe) -> Recipe:
    """The recipe. Raises `ValueError` with one sentence for one that vLLM cannot run."""
    recipe = Recipe.parse(text)
    why = _uneven(recipe) or _unserved(recipe)
    if why is not None:
        raise ValueError(f"vLLM cannot run {recipe}: {why}")
    return recipe


def _uneven(recipe: Recipe) -> str | None:
    try:
        policies_of(recipe, 1)
    except ValueError as error:
        return f"{error} (vLLM has one length for all heads and layers of a request)"
    return None


def _unserved(recipe: Recipe) -> str | None:
    policy, store = recipe.policy, recipe.store
    if store != Dense():
        return f"its pages hold keys and values as they are; leave +{store.name} out"
    if policy.merges:
        return f"{policy.name} folds tokens into others; switch that off (merge=false)"
    if policy.reconstruction is not None:
        return f"{policy.name} reads the prompt a second time; switch that off (reconstruct=false)"
    return None
