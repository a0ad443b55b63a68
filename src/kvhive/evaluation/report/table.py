"""A run for the terminal: the leaderboard, and a table for every task."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.evaluation.report.run import NO_LEADERBOARD, Run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import FULL, Interval, Score, Standing
from kvhive.units import MIB
from kvhive.wrapping import wrap

_LEAST_NAME, _FIGURES = 18, 58  # characters: a recipe's name; all its figures


def leaderboard(run: Run, width: int) -> Table | Text:
    """Recipes by mean skill over the tasks that can show a loss, for a terminal of `width`; a
    sentence where none can.
    """
    if not run.ranked:
        return Text(f"{NO_LEADERBOARD}.", style="bold yellow")
    table = _frame("leaderboard: 100 % like the full cache, 0 % like no context")
    table.add_column("recipe", no_wrap=True)
    for title in ("kept", "bytes", *run.modes):
        table.add_column(title, justify="right", no_wrap=True)
    for one in run.standings:
        name, *cells = standing_cells(one, run.modes)
        table.add_row(Text(_name(name, width), style="bold"), *cells)
    return table


def unfinished(run: Run) -> list[Text]:
    """A warning, and a line for everything that is missing."""
    if not run.missing:
        return []
    head, *parts = run.unfinished()
    return [
        Text(f"{head}; missing:", style="bold red"),
        *(Text(f"  {part}", style="red") for part in parts),
        Text(),
    ]


def task_tables(run: Run, width: int) -> list[Table]:
    """One for every task and mode, with the headline measure; the floor is the last line."""
    tables = []
    for task, mode in run.parts:
        scores = run.headline(task, mode)
        if not scores:
            continue
        table = _frame(score_title(scores[0]))
        table.add_column("recipe", no_wrap=True)
        for title in score_titles(scores[0]):
            table.add_column(title, justify="right", no_wrap=True)
        for score in scores:
            name, *cells = score_cells(score)
            style = "dim" if score.recipe == NONE else ""
            name = _name(name, width)
            table.add_row(Text(name, style=style or "bold"), *(Text(c, style=style) for c in cells))
        tables.append(table)
    return tables


def score_title(score: Score) -> str:
    """Task, mode, measure and how many items, as a heading."""
    arrow = "lower is better" if score.measure.lower_is_better else "higher is better"
    title = f"{score.task}, {score.mode}: {score.measure.name} ({arrow}), {score.items} items"
    return title if score.against == FULL else f"{title}, against {score.against}"


def score_titles(score: Score) -> tuple[str, ...]:
    """Headings of a task's table, behind the recipe's name."""
    if score.against == FULL:
        return "score", "of full", "minus full", "kept", "MiB"
    return "score", "ratio", "difference", "kept", "MiB"


def score_cells(score: Score) -> list[str]:
    """A line of a task's table: the recipe's name, then what `score_titles` says."""
    cells = ["no context" if score.recipe == NONE else score.recipe, f"{score.score.value:.4g}"]
    if score.recipe == score.against:
        cells += ["", ""]
    else:
        cells += [_share(score.ratio), _with_half(score.difference)]
    return [*cells, f"{score.kept:,.0f}", f"{score.nbytes / MIB:.2f}"]


def standing_cells(one: Standing, modes: Sequence[str]) -> list[str]:
    """A line of the leaderboard: the recipe's name, kept, bytes, and its skill in each mode."""
    skills = [_share(one.skills.get(mode)) for mode in modes]
    return [one.recipe, f"{one.kept:.0%}", f"{one.bytes:.0%}", *skills]


def _name(recipe: str, width: int) -> str:
    return wrap(recipe, max(_LEAST_NAME, width - _FIGURES))


def _with_half(figure: Interval) -> str:
    half = "-" if figure.half is None else f"{figure.half:.2g}"
    return f"{figure.value:+.3g} ± {half}"


def _share(figure: Interval | None) -> str:
    if figure is None:
        return "-"
    half = "-" if figure.half is None else f"{100 * figure.half:.1f}"
    return f"{figure.value:.1%} ± {half}"


def _frame(title: str) -> Table:
    return Table(
        title=Text(title, style="bold yellow"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
    )
