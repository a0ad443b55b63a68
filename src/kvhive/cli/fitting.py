"""`--recipe` and `--fit`: what is run, by its budget or by a size in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvhive.cli.completion import complete_recipe
from kvhive.cli.console import note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvhive.cache.footprint import Workload
    from kvhive.inference.prompt import Prompt
    from kvhive.recipe import Recipe

DEFAULT, DEFAULT_BUDGET = "h2o", "0.4"
OneRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help=f"Default: {DEFAULT}@{DEFAULT_BUDGET}.",
        autocompletion=complete_recipe,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="Instead of budgets: the largest whose cache stays within 24MiB, 1.5GB ...",
    ),
]


def default_recipe(fit: str | None) -> str:
    """What runs when no recipe was named."""
    return f"{DEFAULT}@{DEFAULT_BUDGET}" if fit is None else DEFAULT


def read_recipe(recipe: str, fit: str | None) -> Recipe:
    """The recipe as typed; with a size, one whose budget is still to be found. Raises `ValueError`
    for a size or a recipe that cannot be read, before anything is loaded.
    """
    from kvhive.recipe import Recipe
    from kvhive.units import parse_bytes

    if fit is None:
        return Recipe.parse(recipe)
    parse_bytes(fit)
    return Recipe.without_budget(recipe)


def fitted_to(model: PreTrainedModel, recipe: str, fit: str | None, work: Workload) -> Recipe:
    """The recipe to run: as typed, or with the budget that fits. Raises as `cache.fitting`."""
    from kvhive.cache.attention import attach
    from kvhive.cache.fitting import fitted
    from kvhive.cache.profiles import profile_for
    from kvhive.model.outline import Outline

    if fit is None:
        return read_recipe(recipe, None)
    facts = attach(model)
    profile = profile_for(read_recipe(recipe, fit), facts)
    return fitted(recipe, fit, Outline.of(model, facts.rotations or ()), work, profile)


def fitted_recipes(
    network: PreTrainedModel,
    recipes: list[str],
    fit: str,
    prompt: Prompt,
    new: int,
    chunk: int | None,
) -> list[Recipe]:
    """The recipes with the budgets that fit; of the full cache, which runs in any case, whether it
    does is told.
    """
    from kvhive.cache.footprint import Workload
    from kvhive.comparison.run import REFERENCE

    turn = max(map(len, prompt.questions)) + prompt.turns  # the last token of an answer
    work = Workload(tokens=prompt.longest(new) + new, chunk=chunk, turn=turn)
    found = []
    for text in recipes:
        try:
            found.append(fitted_to(network, text, fit, work))
        except ValueError as error:
            if text != str(REFERENCE):
                raise
            note(f"{error}; it runs as the reference all the same.")
        else:
            note(f"{text} fits {fit}" + f" as {found[-1]}" * (text != str(REFERENCE)) + ".")
    return found
