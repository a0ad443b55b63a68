"""A run read back from its folder, with the figures every report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvhive.evaluation.results import read_rows, read_run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import Row, Score, Standing, scores, standings
from kvhive.evaluation.tasks import parse_task
from kvhive.inference.modes import MODES


@dataclass(frozen=True)
class Run:
    """settings and facts as recorded; rows as read; scores and standings worked out of them."""

    name: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: list[Row]
    scores: list[Score]
    standings: list[Standing]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises `FileNotFoundError` for what is no run, `ValueError` for one without rows."""
        recorded = read_run(folder)
        rows = read_rows(folder)
        if not rows:
            raise ValueError(f"{str(folder)!r} holds no results yet; run kvhive evaluate first")
        settings, facts = recorded["settings"], recorded["facts"]
        _check_known(rows, facts)
        return cls.made_of(folder.resolve().name, settings, facts, rows)

    @classmethod
    def made_of(
        cls, name: str, settings: Mapping[str, Any], facts: Mapping[str, Any], rows: list[Row]
    ) -> Run:
        """With the figures that follow from the rows."""
        return cls(name, settings, facts, rows, scores(rows), standings(rows))

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(task, mode) in the order they were run."""
        return list(dict.fromkeys((row["task"], row["mode"]) for row in self.rows))

    @property
    def modes(self) -> list[str]:
        """Those in which some task can show a loss."""
        found = {mode for one in self.standings for mode in one.skills}
        return [mode for mode in MODES if mode in found]

    def against(self, recipe: str) -> Run:
        """With differences and ratios to another recipe than the full cache.

        Raises `ValueError` for a recipe that was not run.
        """
        if recipe not in self.settings["recipes"]:
            known = ", ".join(self.settings["recipes"])
            raise ValueError(f"the run has no recipe {recipe!r} to compare with; it has {known}")
        return replace(self, scores=scores(self.rows, recipe))

    def headline(self, task: str, mode: str) -> list[Score]:
        """Every recipe's score in the task's first measure that it has."""
        part = [one for one in self.scores if (one.task, one.mode) == (task, mode)]
        return [one for one in part if one.measure.name == part[0].measure.name]

    def of(self, task: str, mode: str) -> list[Row]:
        """The rows of one part."""
        return [row for row in self.rows if (row["task"], row["mode"]) == (task, mode)]

    def unclear(self) -> list[str]:
        """Sentences on tasks that cannot show a loss here."""
        sentences = []
        for task, mode in self.parts:
            full = next((one for one in self.headline(task, mode) if one.recipe != NONE), None)
            if full is not None and not full.clear:
                sentences.append(
                    f"{task} ({mode}): the full cache's {full.measure.name} of {full.full:.3g} is "
                    f"within 4 standard errors of the floor ({_spelled(full.floor)}): this task "
                    "cannot show a loss with this model and so many items"
                )
        return sentences


def _check_known(rows: list[Row], facts: Mapping[str, Any]) -> None:
    """Raises `ValueError` for rows of a task that only a plugin of the run defines."""
    for text in dict.fromkeys(row["task"] for row in rows):
        try:
            parse_task(text)
        except ValueError as error:
            if not facts.get("plugin_sha256"):
                raise
            names = " ".join(f"--plugin {name}" for name in facts["plugin_sha256"])
            raise ValueError(f"{error}; the run had {names}: give that here too") from None


def front(points: list[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) points no other point beats in one without losing in the other."""
    return [
        not any(
            (cost <= own_cost and quality > own) or (cost < own_cost and quality >= own)
            for cost, quality in points
        )
        for own_cost, own in points
    ]


def _spelled(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
