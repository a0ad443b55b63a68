"""Results in terminals of two widths."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kvhive.cli.tables import answer_tables, measure_table
from kvhive.comparison.results import COLUMNS, Results, measures
from kvhive.evaluation.report.table import leaderboard, task_tables
from kvhive.wrapping import pieces
from tests.html import examples

LONG = "scissorhands_percentile(keep_fraction=0.05,start=200)@0.4/uniform+dense"


def printed(tables, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def found() -> Results:
    first, *others, last = examples.results()
    return Results([first, *others, replace(last, recipe=LONG)])


@pytest.mark.parametrize("width", [80, 160])
def test_every_figure_is_there_and_names_break_between_their_parts(width):
    results = found()
    text = printed([measure_table(results, width), *answer_tables(results, width)], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for result in results:
        for figure in measures(result):
            assert figure in text
        for piece in pieces(result.recipe):
            assert piece in text
        for answer in result.answers:
            assert answer.text in text


@pytest.mark.parametrize("width", [80, 160])
def test_runs_fit_too(width):
    run = examples.run(("full", "buzz@0.2", LONG))
    text = printed([*task_tables(run, width), leaderboard(run, width)], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for piece in [*pieces(LONG), *pieces("no context")]:
        assert piece in text


def test_a_list_of_results_prints_as_a_table():
    results = found()
    lines = str(results).splitlines()
    assert len(lines) == 1 + len(results)
    assert len(set(map(len, lines))) == 1
    assert all(name in lines[0] for name, _ in COLUMNS)
    assert lines[-1].startswith(LONG)
    assert str(Results()).startswith("recipe")
