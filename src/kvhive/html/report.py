"""The page of `kvhive compare`: table, plots, answers and hive maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvhive.comparison.result import Answer, Result
from kvhive.comparison.results import COLUMNS, measures
from kvhive.html.chart import Chart, Value, quality_chart
from kvhive.html.hive_map import HiveMap
from kvhive.html.look import REFERENCE, Look, looks
from kvhive.templates import COLOURS, render
from kvhive.units import MIB


@dataclass(frozen=True)
class _Row:
    """One recipe of the table. bar: its bytes, in percent of the largest cache."""

    recipe: str
    reference: bool
    look: Look
    cells: tuple[str, ...]
    bar: int


@dataclass(frozen=True)
class _Told:
    """An answer. same: what it has in common with the full cache's; rest: what follows."""

    recipe: str
    look: Look
    note: str
    same: str
    rest: str


def report_page(
    results: Sequence[Result],
    name: str,
    facts: list[str],
    notes: list[str],
    tokens: list[str],
    command: str,
) -> str:
    """A self-contained page.

    name: the document's. facts: model, precision and so on. notes: sentences under the table.
    tokens: the text of every token seen, for the maps. command: what made the page. All plain text.
    """
    look_of = _looks(results)
    rows = _rows(results, look_of)
    return render(
        "compare.html.j2",
        kind="compare",
        heading=name,
        facts=facts,
        command=command,
        columns=COLUMNS,
        rows=rows,
        notes=notes,
        charts=_charts(results, look_of),
        questions=[
            {
                "question": results[0].answers[place].question,
                "answers": _answers(results, look_of, place),
            }
            for place in range(len(results[0].answers))
        ],
        maps=[
            (row, HiveMap.of(result.survivors, COLOURS[row.look.colour - 1]))
            for row, result in zip(rows, results, strict=True)
            if not result.reference
        ],
        tokens=tokens,
    )


def _looks(results: Sequence[Result]) -> dict[str, Look]:
    look_of = looks(result.recipe for result in results if not result.reference)
    return look_of | {result.recipe: REFERENCE for result in results if result.reference}


def _rows(results: Sequence[Result], look_of: dict[str, Look]) -> list[_Row]:
    largest = max(result.report.nbytes for result in results) or 1
    return [
        _Row(
            result.recipe,
            result.reference,
            look_of[result.recipe],
            measures(result),
            round(100 * result.report.nbytes / largest),
        )
        for result in results
    ]


def _charts(results: Sequence[Result], look_of: dict[str, Look]) -> list[Chart]:
    """KL divergence and top-1 agreement over the cache's MiB; none without a reference."""
    measured = [(result, result.fidelity) for result in results if result.fidelity]
    if not measured:
        return []
    kl = [(result, fidelity.kl) for result, fidelity in measured]
    top1 = [(result, 100 * fidelity.top1) for result, fidelity in measured]
    return [
        _chart(kl, look_of, "KL divergence (nats), lower is better"),
        _chart(top1, look_of, "top-1 agreement (%), higher is better"),
    ]


def _chart(figures: Sequence[tuple[Result, float]], look_of: dict[str, Look], title: str) -> Chart:
    values = [
        Value(one.recipe, look_of[one.recipe], one.report.nbytes / MIB, up, up, up)
        for one, up in figures
    ]
    return quality_chart(values, "cache memory (MiB)", title)


def _answers(results: Sequence[Result], look_of: dict[str, Look], place: int) -> list[_Told]:
    full = next((result.answers[place] for result in results if result.reference), None)
    told = []
    for result in results:
        answer = result.answers[place]
        note = "" if result.reference or full is None else _agreement(answer, full)
        same, rest = _split(answer, full)
        told.append(_Told(result.recipe, look_of[result.recipe], note, same, rest))
    return told


def _agreement(answer: Answer, full: Answer) -> str:
    return "same as full" if answer.tokens == full.tokens else "differs"


def _split(answer: Answer, full: Answer | None) -> tuple[str, str]:
    """The answer, parted before the first word that is not the full cache's."""
    if full is None or answer.tokens == full.tokens:
        return answer.text, ""
    pairs = zip(answer.text.split(" "), full.text.split(" "), strict=False)
    same = " ".join(mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    rest = answer.text[len(same) :]
    gap = rest[: len(rest) - len(rest.lstrip())]
    return same + gap, rest.lstrip()
