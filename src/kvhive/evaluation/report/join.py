"""Several runs of different recipes on the same items, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvhive.evaluation.report.run import Run
from kvhive.evaluation.statistics import Row

_MAY_DIFFER = ("recipes", "tasks", "modes", "limit", "plugins")

Key = tuple[str, str, str]


def join(runs: Sequence[Run]) -> Run:
    """The items that all runs hold. A recipe of several runs, as the full cache and the floor are,
    is taken from the first.

    Raises `ValueError` naming the setting in which runs differ, or when they share no item.
    """
    first, *others = runs
    for other in others:
        _check_same(first, other)
    shared = set.intersection(*({_key(row) for row in run.rows} for run in runs))
    if not shared:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"the runs {names} have no item in common")
    rows: dict[Key, dict[str, Row]] = {_key(row): {} for row in first.rows if _key(row) in shared}
    for run in runs:
        for row in run.rows:
            if _key(row) in shared:
                rows[_key(row)].setdefault(row["recipe"], row)
    recipes = dict.fromkeys(name for run in runs for name in run.settings["recipes"])
    settings = {**first.settings, "recipes": list(recipes)}
    joined = [row for of_item in rows.values() for row in of_item.values()]
    lacking = list(dict.fromkeys(one for run in runs for one in run.missing))
    name = " + ".join(run.name for run in runs)
    return Run.made_of(name, settings, first.facts, joined, lacking)


def _key(row: Row) -> Key:
    return row["task"], row["mode"], row["item"]


def _check_same(one: Run, other: Run) -> None:
    ours, theirs = _conditions(one), _conditions(other)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"runs {one.name} and {other.name} differ in {name} ({value!r} and "
                f"{theirs.get(name)!r}); only runs of the same conditions can be joined"
            )


def _conditions(run: Run) -> Mapping[str, Any]:
    kept = {name: value for name, value in run.settings.items() if name not in _MAY_DIFFER}
    return {**kept, "model_sha256": run.facts["model_sha256"]}
