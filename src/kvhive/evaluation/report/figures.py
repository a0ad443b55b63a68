"""The tables of a run's page as plain values; `evaluation.html.j2` draws them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvhive.evaluation.report.run import Run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import Interval, Score
from kvhive.html.look import Look
from kvhive.units import MIB

_BUDGET = re.compile(r"@([^/+]+)")
_MOST_COLUMNS = 8  # tasks side by side: so many fit a page of paper


@dataclass(frozen=True)
class Cell:
    """text, and below it a smaller one. value: what to sort by.

    opens: whether it leads to its items. faint: whether the task cannot show a loss.
    """

    text: str = ""
    value: float | None = None
    small: str = ""
    opens: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Column:
    """A heading. part, measure: where the items of its cells are found."""

    title: str
    small: str = ""
    part: int | None = None
    measure: str = ""


@dataclass(frozen=True)
class Line:
    """One recipe. budget: what follows its "@"; empty for the full cache and the floor."""

    recipe: str
    shown: str
    budget: str
    look: Look
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """label: what it is about, for screen readers."""

    label: str
    columns: list[Column]
    lines: list[Line]


def leaderboard(run: Run, look_of: Mapping[str, Look]) -> Table:
    """Recipes by mean skill."""
    columns = [Column("kept"), Column("bytes"), *(Column("skill", mode) for mode in run.modes)]
    lines = []
    for one in run.standings:
        cells = [Cell(f"{one.kept:.0%}", one.kept), Cell(f"{one.bytes:.0%}", one.bytes)]
        cells += [_percent(one.skills.get(mode)) for mode in run.modes]
        lines.append(_line(one.recipe, look_of, cells))
    return Table("Leaderboard", columns, lines)


def score_tables(run: Run, mode: str, look_of: Mapping[str, Look]) -> list[Table]:
    """Every recipe's headline score in the tasks of one mode, a few tasks to a table."""
    parts = [
        (number, scores)
        for number, (task, of_mode) in enumerate(run.parts)
        if of_mode == mode and (scores := run.headline(task, of_mode))
    ]
    return [
        _score_table(run, mode, look_of, parts[first : first + _MOST_COLUMNS])
        for first in range(0, len(parts), _MOST_COLUMNS)
    ]


def part_table(run: Run, number: int, look_of: Mapping[str, Look]) -> Table:
    """One task in one mode: every recipe in every measure; the floor is the last line."""
    task, mode = run.parts[number]
    part = [one for one in run.scores if (one.task, one.mode) == (task, mode)]
    measures = list(dict.fromkeys(one.measure.name for one in part))
    found = {(one.recipe, one.measure.name): one for one in part}
    lines = []
    for first in {one.recipe: one for one in reversed(part)}.values():
        cells = [
            Cell(f"{first.kept:,.0f}", first.kept),
            Cell(f"{first.nbytes / MIB:.2f}", first.nbytes),
            *(_score(found.get((first.recipe, measure))) for measure in measures),
        ]
        lines.append(_line(first.recipe, look_of, cells))
    columns = [Column("tokens", "kept"), Column("cache", "MiB")]
    columns += [Column(measure, "", number, measure) for measure in measures]
    return Table(f"{task}, {mode}", columns, lines[::-1])


def _score_table(
    run: Run,
    mode: str,
    look_of: Mapping[str, Look],
    parts: Sequence[tuple[int, list[Score]]],
) -> Table:
    columns = [
        Column(scores[0].task, scores[0].measure.name, number, scores[0].measure.name)
        for number, scores in parts
    ]
    by_recipe = [{score.recipe: score for score in scores} for _, scores in parts]
    lines = [
        _line(one.recipe, look_of, [_score(of.get(one.recipe)) for of in by_recipe])
        for one in run.standings
    ]
    return Table(f"Scores by task, {mode}", columns, lines)


def _line(recipe: str, look_of: Mapping[str, Look], cells: list[Cell]) -> Line:
    shown = "no context" if recipe == NONE else recipe
    budget = _BUDGET.search(recipe)
    return Line(recipe, shown, budget[1] if budget else "", look_of[recipe], cells)


def _percent(figure: Interval | None) -> Cell:
    if figure is None:
        return Cell("-")
    half = "-" if figure.half is None else f"{100 * figure.half:.1f}"
    return Cell(f"{figure.value:.1%}", figure.value, f"± {half}")


def _score(score: Score | None) -> Cell:
    """A score that opens its items."""
    if score is None:
        return Cell()
    share = "" if score.ratio is None else f"{score.ratio.value:.0%} of {score.against}"
    value = score.score.value
    return Cell(f"{value:.3g}", value, share, opens=True, faint=not score.clear)
