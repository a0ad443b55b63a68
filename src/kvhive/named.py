"""Recipes that have a name, chosen by measurement (`docs/results/stores.md`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """recipe: as it prints itself. promise: what it is for, in a line."""

    recipe: str
    promise: str


NAMED: Mapping[str, Named] = {
    "balanced": Named(
        "hive@0.6+tiers(share=0.3)", "99 % of the full cache's score at a fifth of its bytes"
    ),
    "small": Named("hive@0.35+tiers", "95 % of the full cache's score at an eighth of its bytes"),
}


def with_name(recipe: str) -> str:
    """A recipe as it prints itself, behind its name where it has one."""
    names = [name for name, named in NAMED.items() if named.recipe == recipe]
    return f"{names[0]} = {recipe}" if names else recipe


def unnamed(text: str) -> str:
    """The recipe that a name stands for; any other text as it is.

    Raises `ValueError` for a name with something behind it: it is a whole recipe.
    """
    for name, named in NAMED.items():
        if text.strip() == name:
            return named.recipe
        rest = text.strip().removeprefix(name)
        if rest != text.strip() and rest[0] in "(@/+ ":
            raise ValueError(
                f"recipe {text!r}: {name} is a whole recipe; write it alone, or change what it "
                f"stands for: {named.recipe}"
            )
    return text
