"""A run as CSV: one line for every task, mode, recipe and measure."""

from __future__ import annotations

import csv
import io

from kvhive.evaluation.report.run import Run
from kvhive.evaluation.statistics import Interval

COLUMNS = (
    *(
        "task",
        "mode",
        "recipe",
        "measure",
        "items",
        "items_wanted",
        "score",
        "score_low",
        "score_high",
        "against",
    ),
    *("full", "floor", "difference", "difference_low", "difference_high", "ratio", "ratio_low"),
    *("ratio_high", "skill", "skill_low", "skill_high", "clear_of_floor", "lower_is_better"),
    *("tokens_seen", "tokens_kept", "cache_bytes", "full_cache_bytes"),
)


def as_csv(run: Run) -> str:
    """The text of the file, with a header line. Empty cells where a figure means nothing.

    items_wanted: how many the run was to have, where it has fewer. What is missing altogether has a
    line without a measure.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    lacking = {(one.task, one.mode, one.recipe): one for one in run.missing}
    for one in run.scores:
        key = one.task, one.mode
        short = lacking.get((*key, None)) or lacking.get((*key, one.recipe))
        writer.writerow(
            [
                *(one.task, one.mode, one.recipe, one.measure.name, one.items),
                short.wanted if short else "",
                *(*_three(one.score), one.against, _short(one.full), _short(one.floor)),
                *(*_three(one.difference), *_three(one.ratio), *_three(one.skill)),
                *(int(one.clear), int(one.measure.lower_is_better)),
                *(f"{one.seen:.1f}", f"{one.kept:.1f}"),
                *(f"{one.nbytes:.0f}", f"{one.full_bytes:.0f}"),
            ]
        )
    shown = {(one.task, one.mode, one.recipe) for one in run.scores}
    parts = {(task, mode) for task, mode, _ in shown}
    for (task, mode, recipe), lack in lacking.items():
        if (task, mode, recipe) not in shown and (recipe or (task, mode) not in parts):
            cells = [task, mode, recipe or "", "", lack.items, lack.wanted]
            writer.writerow(cells + [""] * (len(COLUMNS) - len(cells)))
    return file.getvalue()


def _three(figure: Interval | None) -> list[str]:
    if figure is None:
        return ["", "", ""]
    return [_short(figure.value), _short(figure.low), _short(figure.high)]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
