"""One task in one mode, as a section of a run's page: table, plots, heat maps, items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvhive.evaluation.report.figures import Table, part_table
from kvhive.evaluation.report.heat import Heat, heat_maps
from kvhive.evaluation.report.items import pack
from kvhive.evaluation.report.run import Run, front
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import Score, by_fact
from kvhive.html.chart import Chart, Value, quality_chart, turn_chart
from kvhive.html.look import Look
from kvhive.units import MIB


@dataclass(frozen=True)
class Part:
    """number: its place among the run's parts. items: packed rows for the item list."""

    number: int
    task: str
    mode: str
    measure: str
    count: int
    table: Table
    charts: list[Chart]
    heats: list[Heat]
    legend: list[tuple[Look, str]]
    items: str


def parts(run: Run, look_of: Mapping[str, Look]) -> list[Part]:
    """All tasks and modes that have a score."""
    found = []
    for number, (task, mode) in enumerate(run.parts):
        scores = run.headline(task, mode)
        if scores:
            found.append(_part(run, number, scores, look_of))
    return found


def policy(recipe: str) -> str:
    """A recipe without its budget. Recipes of one policy look alike."""
    return recipe.partition("@")[0]


def _part(run: Run, number: int, scores: list[Score], look_of: Mapping[str, Look]) -> Part:
    task, mode = run.parts[number]
    measure = scores[0].measure.name
    rows = run.of(task, mode)
    shown = [one for one in scores if one.recipe != NONE]
    turns = {
        name: line
        for name, line in by_fact(rows, measure, "turn").items()
        if name != NONE and len(line) > 1
    }
    charts = [_quality(shown, look_of)]
    if turns:
        charts.append(turn_chart(turns, look_of, measure))
    return Part(
        number=number,
        task=task,
        mode=mode,
        measure=measure,
        count=scores[0].items,
        table=part_table(run, number, look_of),
        charts=charts,
        heats=heat_maps(rows, measure),
        legend=list({look_of[one.recipe]: policy(one.recipe) for one in shown}.items()),
        items=pack(rows),
    )


def _quality(scores: list[Score], look_of: Mapping[str, Look]) -> Chart:
    lower = scores[0].measure.lower_is_better
    best = front([(one.nbytes, one.score.value * (-1 if lower else 1)) for one in scores])
    values = [
        Value(
            one.recipe,
            look_of[one.recipe],
            one.nbytes / MIB,
            one.score.value,
            *one.score.bounds,
            on_front,
        )
        for one, on_front in zip(scores, best, strict=True)
    ]
    arrow = "lower is better" if lower else "higher is better"
    return quality_chart(values, "cache memory (MiB)", f"{scores[0].measure.name}, {arrow}")
