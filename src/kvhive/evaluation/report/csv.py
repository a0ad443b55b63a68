"""A run as CSV: one line for every task, mode, recipe and measure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from kvhive.evaluation.statistics import Interval, Score

COLUMNS = (
    *("task", "mode", "recipe", "measure", "items", "score", "score_low", "score_high", "against"),
    *("full", "floor", "difference", "difference_low", "difference_high", "ratio", "ratio_low"),
    *("ratio_high", "skill", "skill_low", "skill_high", "clear_of_floor", "lower_is_better"),
    *("tokens_seen", "tokens_kept", "cache_bytes", "full_cache_bytes"),
)


def as_csv(scores: Iterable[Score]) -> str:
    """The text of the file, with a header line. Empty cells where a figure means nothing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in scores:
        writer.writerow(
            [
                *(one.task, one.mode, one.recipe, one.measure.name, one.items),
                *(*_three(one.score), one.against, _short(one.full), _short(one.floor)),
                *(*_three(one.difference), *_three(one.ratio), *_three(one.skill)),
                *(int(one.clear), int(one.measure.lower_is_better)),
                *(f"{one.seen:.1f}", f"{one.kept:.1f}"),
                *(f"{one.nbytes:.0f}", f"{one.full_bytes:.0f}"),
            ]
        )
    return file.getvalue()


def _three(figure: Interval | None) -> list[str]:
    if figure is None:
        return ["", "", ""]
    return [_short(figure.value), _short(figure.low), _short(figure.high)]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
