"""Recipes that an engine with one length for a request can run; all others are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvhive.lengths import policies_of
from kvhive.plugins import anywhere, load_plugins
from kvhive.recipe import Recipe
from kvhive.stores.dense import Dense

KEY = "kvhive"  # of vLLM's `additional_config`
RECIPE, PLUGINS = "recipe", "plugins"  # what it holds
SCHEDULER = "kvhive_vllm.scheduler.HiveScheduler"
WORKER = "kvhive_vllm.worker.HiveWorker"


def read(text: str | Recipe) -> Recipe:
    """The recipe. Raises `ValueError` with one sentence for one that vLLM cannot run."""
    recipe = Recipe.parse(text)
    why = _uneven(recipe) or _unserved(recipe)
    if why is not None:
        raise ValueError(f"vLLM cannot run {recipe}: {why}")
    return recipe


def settings(recipe: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """`additional_config` for a recipe; plugins: files or modules that it may come from.

    Raises as `read` and `kvhive.plugins.load_plugins`.
    """
    load_plugins(plugins)
    own: dict[str, Any] = {RECIPE: str(read(recipe))}
    if plugins:
        own[PLUGINS] = list(anywhere(plugins))
    return {KEY: own}


def configured(given: object) -> Recipe | None:
    """The recipe of such an `additional_config`, its plugins loaded; None: it names none.

    Raises `ValueError` for unknown settings, else as `settings`.
    """
    own = given.get(KEY) if isinstance(given, dict) else None
    if own is None:
        return None
    if not isinstance(own, dict) or not {RECIPE} <= set(own) <= {RECIPE, PLUGINS}:
        raise ValueError(
            f"additional_config[{KEY!r}] must be {{'recipe': 'h2o@1024'}} or the like, got {own}"
        )
    plugins = own.get(PLUGINS, [])
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ValueError(
            f"plugins of additional_config[{KEY!r}] must be a list of files or modules, got "
            f"{plugins!r}"
        )
    load_plugins(plugins)
    return read(own[RECIPE])


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
