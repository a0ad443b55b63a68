"""The page of `kvhive report`: leaderboard, scores, a section for every task, and all items."""

from __future__ import annotations

from typing import Any

from kvhive.evaluation.report.figures import leaderboard, score_tables
from kvhive.evaluation.report.part import parts, policy
from kvhive.evaluation.report.run import NO_LEADERBOARD, Run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import FULL
from kvhive.html.look import REFERENCE, Look, looks
from kvhive.templates import render


def report_page(run: Run, command: str) -> str:
    """A self-contained page. command: what made it."""
    look_of = _looks(run)
    board = leaderboard(run, look_of)
    settings = run.settings
    return render(
        "evaluation.html.j2",
        kind="report",
        heading=run.name,
        facts=[
            f"{settings['model']} in {settings['dtype']}",
            f"{len(run.standings)} recipes",
            f"{len(run.parts)} tasks and modes",
            f"{len({(row['task'], row['mode'], row['item']) for row in run.rows})} items",
            f"seed {settings['seed']}",
        ],
        command=command,
        board=board,
        budgets=sorted({line.budget for line in board.lines if line.budget}, key=_size),
        unfinished=run.unfinished(),
        not_ranked="" if run.ranked else NO_LEADERBOARD,
        unclear=run.unclear(),
        scores=[
            (mode, score_tables(run, mode, look_of))
            for mode in dict.fromkeys(mode for _, mode in run.parts)
        ],
        parts=parts(run, look_of),
        conditions=[(name, _plain(value)) for name, value in {**run.settings, **run.facts}.items()],
    )


def _looks(run: Run) -> dict[str, Look]:
    """Recipes of one policy look alike: their budgets lie along the plots anyway."""
    names = list(dict.fromkeys(row["recipe"] for row in run.rows))
    of_policy = looks(policy(name) for name in names if name not in (FULL, NONE))
    return {name: of_policy.get(policy(name), REFERENCE) for name in names}


def _size(budget: str) -> tuple[int, float, str]:
    """Numbers by their size, before what is none."""
    try:
        return 0, float(budget), budget
    except ValueError:
        return 1, 0.0, budget


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {one}" for name, one in value.items())
    return "-" if value is None else str(value)
