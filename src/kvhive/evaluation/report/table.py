"""A run for the terminal: the leaderboard, and a table for every task."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.evaluation.report.run import Run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import FULL, Interval, Score
from kvhive.report import MIB


def leaderboard(run: Run) -> Table:
    """Recipes by mean skill over the tasks that can show a loss."""
    modes = [mode for mode in ("agnostic", "aware", "stream") if _has(run, mode)]
    table = _frame("leaderboard: 100 % like the full cache, 0 % like no context")
    table.add_column("recipe", overflow="fold")
    for title in ("kept", "bytes", *modes):
        table.add_column(title, justify="right", no_wrap=True)
    for one in run.standings:
        told = [_share(one.skills.get(mode)) for mode in modes]
        table.add_row(Text(one.recipe, style="bold"), f"{one.kept:.0%}", f"{one.bytes:.0%}", *told)
    return table


def task_tables(run: Run) -> list[Table]:
    """One for every task and mode, with the headline measure; the floor is the last line."""
    tables = []
    for task, mode in run.parts:
        scores = run.headline(task, mode)
        if not scores:
            continue
        first = scores[0]
        arrow = "lower is better" if first.measure.lower_is_better else "higher is better"
        table = _frame(f"{task}, {mode}: {first.measure.name} ({arrow}), {first.items} items")
        table.add_column("recipe", overflow="fold")
        for title in ("score", "of full", "minus full", "kept", "MiB"):
            table.add_column(title, justify="right", no_wrap=True)
        for score in scores:
            table.add_row(*_cells(score))
        tables.append(table)
    return tables


def _cells(score: Score) -> list[Text]:
    name = "no context" if score.recipe == NONE else score.recipe
    plain = [f"{score.score.value:.4g}"]
    if score.recipe == FULL:
        plain += ["", ""]
    else:
        plain += [_share(score.ratio), _with_half(score.difference)]
    plain += [f"{score.kept:,.0f}", f"{score.nbytes / MIB:.2f}"]
    style = "dim" if score.recipe == NONE else ""
    return [Text(name, style=style or "bold"), *(Text(cell, style=style) for cell in plain)]


def _with_half(figure: Interval) -> str:
    return f"{figure.value:+.3g} ± {(figure.high - figure.low) / 2:.2g}"


def _share(figure: Interval | None) -> str:
    if figure is None:
        return "-"
    half = (figure.high - figure.low) / 2
    return f"{figure.value:.1%} ± {100 * half:.1f}"


def _has(run: Run, mode: str) -> bool:
    return any(mode in one.skills for one in run.standings)


def _frame(title: str) -> Table:
    return Table(
        title=Text(title, style="bold yellow"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
    )
