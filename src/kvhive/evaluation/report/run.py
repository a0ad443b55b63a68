"""A run read back from its folder, with the figures every report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvhive.evaluation.report.missing import Missing, missing
from kvhive.evaluation.results import RUN, numbered_rows, read_run, rows_file
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import ENOUGH, Row, Score, Standing, scores, standings
from kvhive.evaluation.tasks import parse_task
from kvhive.inference.modes import MODES

UNFINISHED = "this run is unfinished: the same kvhive evaluate command goes on with it"
NO_LEADERBOARD = "no leaderboard: none of the tasks can show a loss here"


@dataclass(frozen=True)
class Run:
    """settings and facts as recorded; rows as read; scores and standings worked out of them;
    missing: what was to be run and was not.
    """

    name: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: list[Row]
    scores: list[Score]
    standings: list[Standing]
    missing: list[Missing]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises `FileNotFoundError` for what is no run, `ValueError` for one without rows, and
        for damage, naming file, line and field.
        """
        recorded = read_run(folder)
        settings, facts = recorded["settings"], recorded["facts"]
        for text in settings["tasks"]:
            _check_known(text, facts, f"{str(folder / RUN)!r}, field 'settings.tasks'")
        numbered = dict(numbered_rows(folder))
        tasks = {row["task"]: number for number, row in reversed(numbered.items())}
        for text, number in tasks.items():
            where = f"{str(rows_file(folder)[0])!r}, line {number}, field 'task'"
            _check_known(text, facts, where)
        rows = list(numbered.values())
        if not rows:
            raise ValueError(f"{str(folder)!r} holds no results yet; run kvhive evaluate first")
        found = missing(settings, facts, rows)
        return cls.made_of(folder.resolve().name, settings, facts, rows, found)

    @classmethod
    def made_of(
        cls,
        name: str,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        rows: list[Row],
        missing: list[Missing],
    ) -> Run:
        """With the figures that follow from the rows."""
        return cls(name, settings, facts, rows, scores(rows), standings(rows), missing)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(task, mode) in the order they were run."""
        return list(dict.fromkeys((row["task"], row["mode"]) for row in self.rows))

    @property
    def ranked(self) -> bool:
        """Whether there is a leaderboard: whether some task can show a loss."""
        return bool(self.modes)

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

    def unfinished(self) -> list[str]:
        """What is missing, a sentence for each part below a first that says so; empty if nothing
        is.
        """
        if not self.missing:
            return []
        parts = len({(one.task, one.mode) for one in self.missing})
        return [f"{UNFINISHED} (in {parts} of its tasks and modes)", *map(str, self.missing)]

    def unclear(self) -> list[str]:
        """Sentences on tasks that cannot show a loss here."""
        sentences = []
        for task, mode in self.parts:
            full = next((one for one in self.headline(task, mode) if one.recipe != NONE), None)
            if full is not None and full.clusters < ENOUGH:
                sentences.append(
                    f"{task} ({mode}): {_counted(full)} too few for intervals, "
                    f"and to tell whether this task can show a loss; at least {ENOUGH} are needed"
                )
            elif full is not None and not full.clear:
                sentences.append(
                    f"{task} ({mode}): the full cache's {full.measure.name} of {full.full:.3g} is "
                    f"within 4 standard errors of the floor ({_spelled(full.floor)}): this task "
                    "cannot show a loss with this model and so many items"
                )
        return sentences


def _counted(score: Score) -> str:
    """What an interval is drawn from, with its verb."""
    one, several = ("item", "items")
    if score.items != score.clusters:
        one, several = ("group of items", "groups of items")
    return f"1 {one} is" if score.clusters == 1 else f"{score.clusters} {several} are"


def _check_known(text: str, facts: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` for an unknown task, perhaps one that a plugin of the run defines."""
    try:
        parse_task(text)
    except ValueError as error:
        names = " ".join(f"--plugin {name}" for name in facts.get("plugin_sha256", {}))
        advice = f"; the run had {names}: give that here too" if names else ""
        raise ValueError(f"{where}: {error}{advice}") from None


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
