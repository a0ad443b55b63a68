"""Scores of the same items through two engines, from two runs of `kvhive evaluate`, as Markdown.

    python benchmarks/quality.py runs/transformers runs/vllm > table.md

Differences are paired, item by item, with 95 % bootstrap intervals, as in `kvhive report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from kvhive.evaluation.report.run import Run
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import Row, interval, sample_of
from kvhive.evaluation.tasks import parse_task

HEAD = ("task", "recipe", "items", "{}", "{}", "difference", "95 % interval", "same answer", "kept")


def main(
    one: Annotated[Path, typer.Argument(help="A run's folder.")],
    other: Annotated[Path, typer.Argument(help="One of the same items, through another engine.")],
) -> None:
    """A row for every task and recipe, on the items that both runs hold."""
    runs = [Run.read(one), Run.read(other)]
    names = [run.settings["engine"] for run in runs]
    _check_same(runs)
    typer.echo(_line([cell.format(name) for cell, name in zip(HEAD, _spread(names), strict=True)]))
    typer.echo(_line(["---", "---", *["---:"] * (len(HEAD) - 2)]))
    first, second = ({_key(row): row for row in run.rows} for run in runs)
    shared = [key for key in first if key in second]
    for part in dict.fromkeys((task, recipe) for task, _, _, recipe in shared):
        keys = [key for key in shared if (key[0], key[3]) == part]
        pairs = [(first[key], second[key]) for key in keys]
        typer.echo(_line([part[0], _named(part[1]), *_cells(part[0], pairs)]))


def _cells(task: str, pairs: list[tuple[Row, Row]]) -> list[str]:
    measure = parse_task(task).measures[0].name
    rows = [{**row, "recipe": side} for pair in pairs for side, row in zip("ab", pair, strict=True)]
    sample = sample_of(rows, measure)
    assert sample is not None
    ours, theirs = sample.means("a"), sample.means("b")
    apart = interval(theirs - ours, sample.count)
    low, high = apart.bounds
    same = [_texts(a) == _texts(b) for a, b in pairs]
    held = {(a["seen"], a["kept"]) == (b["seen"], b["kept"]) for a, b in pairs}
    kept = sum(b["kept"] / b["seen"] for _, b in pairs) / len(pairs)
    return [
        str(len(pairs)),
        f"{ours[0]:.3f}",
        f"{theirs[0]:.3f}",
        f"{apart.value:+.3f}",
        "too few items" if apart.low is None else f"{low:+.3f} to {high:+.3f}",
        f"{sum(same) / len(same):.0%}",
        f"{kept:.0%}" if held == {True} else f"{kept:.0%}, not alike",
    ]


def _texts(row: Row) -> list[str]:
    return [probe["text"] for probe in row["probes"]]


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["task"], row["mode"], row["item"], row["recipe"]


def _named(recipe: str) -> str:
    return "full, no context" if recipe == NONE else recipe


def _spread(names: list[str]) -> list[str]:
    return ["", "", "", *names, *[""] * (len(HEAD) - 5)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _check_same(runs: list[Run]) -> None:
    """Raises `typer.BadParameter` where other items or models were run."""
    for name in ("dtype", "seed", "modes"):
        if len({str(run.settings[name]) for run in runs}) > 1:
            raise typer.BadParameter(f"the runs differ in {name}")
    for fact in ("model_sha256", "data"):
        shared: list[Any] = [run.facts[fact] for run in runs]
        if shared[0] != shared[1]:
            raise typer.BadParameter(f"the runs differ in {fact}")


if __name__ == "__main__":
    typer.run(main)
