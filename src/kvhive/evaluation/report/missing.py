"""What a run was to measure and has not: a run that was stopped looks finished otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvhive.evaluation.settings import NONE, modes_of
from kvhive.evaluation.tasks import parse_task


@dataclass(frozen=True)
class Missing:
    """A task in one mode of which fewer items were run than wanted. recipe: the one that lacks
    them, `NONE` for the floor; None where every recipe has as many.
    """

    task: str
    mode: str
    recipe: str | None
    items: int
    wanted: int

    def __str__(self) -> str:
        name = "no context" if self.recipe == NONE else self.recipe
        whose = f", {name}" if name else ""
        return f"{self.task} ({self.mode}){whose}: {self.items} of {self.wanted} items"


def missing(
    settings: Mapping[str, Any], facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Missing]:
    """In the order of the run. settings, facts: of `run.json`, which says what was wanted."""
    counts = Counter((row["task"], row["mode"], row["recipe"]) for row in rows)
    items = facts.get("items", {})  # fewer than the limit where the data hold no more
    found: list[Missing] = []
    for text, mode in _parts(settings):
        wanted = items.get(text, settings["limit"])
        held = {name: counts[text, mode, name] for name in (*settings["recipes"], NONE)}
        if len(set(held.values())) == 1:
            held = {None: counts[text, mode, NONE]}
        found += [Missing(text, mode, *one, wanted) for one in held.items() if one[1] < wanted]
    return found


def _parts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(task, mode) of all that was to be run."""
    for text in settings["tasks"]:
        task = parse_task(text)
        # Streams ran in any mode once.
        for mode in modes_of(task, settings["modes"]) or task.modes:
            yield text, mode
