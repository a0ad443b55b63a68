"""A recipe with a budget that dropped nothing, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhive.cache.report import Report


def kept_all(report: Report) -> str:
    """One sentence where a budget was no limit for what was read; else empty."""
    from kvhive.budget import FLOOR
    from kvhive.recipe import Recipe

    recipe, seen = Recipe.parse(report.recipe), report.tokens_seen
    if recipe.budget is None or report.tokens_kept < seen:
        return ""
    least = recipe.policy.sizing.least
    if least >= seen:
        why = f"its sinks, window and the like ask for {least:,} tokens"
    elif recipe.budget.tokens is None and seen <= FLOOR:
        why = f"a share is never less than {FLOOR} tokens"
    else:
        why = "its budget is not below that"
    return f"{recipe} kept all {seen:,} tokens: {why}."
