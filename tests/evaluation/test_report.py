"""Reports of a small run: table, CSV, and the page in a real browser."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvhive.cli import app
from kvhive.evaluation.report.csv import COLUMNS, as_csv
from kvhive.evaluation.report.heat import HeatCell, heat_maps
from kvhive.evaluation.report.items import pack, unpack
from kvhive.evaluation.report.join import join
from kvhive.evaluation.report.markdown import as_markdown
from kvhive.evaluation.report.page import report_page
from kvhive.evaluation.report.run import Run
from kvhive.evaluation.report.table import leaderboard, task_tables
from kvhive.evaluation.scheduler import evaluate
from kvhive.evaluation.settings import Settings
from kvhive.evaluation.statistics import Interval

RECORDED = Path(__file__).parents[2] / "docs" / "results" / "stream_buzz"
TASKS = (
    "passkey(lengths=(300, 500), depths=(0.0, 1.0))",
    "shared_context(asked=3, turns=True)",
    "xsum(tokens=300)",
)


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a<b>"
    settings = Settings(
        model=str(folder),
        recipes=("h2o@0.3", "streaming_llm@90"),
        tasks=TASKS,
        limit=6,
        data="builtin",
        dtype="float32",
    )
    return evaluate(replace(settings, modes=("agnostic",)), out)


@pytest.fixture(scope="module")
def run(ran: Path) -> Run:
    return Run.read(ran)


def test_a_recipe_is_found_under_the_name_it_was_recorded_with() -> None:
    """Also where the method has another name now: buzz(history=log) became buzz_log."""
    words = ["report", str(RECORDED), "--against", "buzz(history=log)@0.4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "against buzz(history=log)@0.4" in " ".join(result.stdout.split())


def shown(run: Run, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for table in (*task_tables(run, width), leaderboard(run, width)):
        console.print(table)
    return console.file.getvalue()


def test_the_table_names_every_task_and_recipe(run):
    text = shown(run)
    for name in (
        "passkey",
        "shared_context",
        "xsum",
        "full",
        "h2o@0.3",
        "no context",
        "leaderboard",
    ):
        assert name in text
    score = run.headline(TASKS[2], "agnostic")[1]
    assert f"{score.score.value:.4g}" in text


def test_unclear_tasks_are_told(run):
    """A random model can do nothing, so no task is clear of its floor by itself."""
    got = run.unclear()
    assert any(sentence.startswith("passkey") for sentence in got)
    assert all("within 4 standard errors of the floor" in sentence for sentence in got)


def test_csv_holds_every_figure(run):
    rows = list(csv.DictReader(io.StringIO(as_csv(run))))
    assert len(rows) == len(run.scores)
    assert list(rows[0]) == list(COLUMNS)
    for line, score in zip(rows, run.scores, strict=True):
        assert line["recipe"] == score.recipe
        assert float(line["score"]) == pytest.approx(score.score.value, rel=1e-5)
        assert float(line["cache_bytes"]) == pytest.approx(score.nbytes, abs=0.5)
        assert (line["ratio"] == "") == (score.ratio is None)


def test_markdown_has_a_line_for_every_recipe_of_every_task(run):
    text = as_markdown(run, "kvhive report here")
    assert text.startswith(f"<!-- kvhive report -->\n# {run.name}\n")
    assert text.endswith("`kvhive report here`.\n")
    tables = text.split("\n## ")[1:]
    assert len(tables) == 1 + len(run.parts)
    for (task, mode), table in zip(run.parts, tables[1:], strict=True):
        rows = [line for line in table.splitlines() if line.startswith("| ")]
        assert table.startswith(f"{task}, {mode}: ")
        names = [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]]
        scores = run.headline(task, mode)
        assert names == ["no context" if s.recipe == "none" else s.recipe for s in scores]
        assert {row.count(" | ") for row in rows} == {5}
        assert f"| {scores[0].score.value:.4g} |" in rows[2]


def test_a_packed_run_reads_as_the_one_it_was(run, ran, tmp_path):
    (tmp_path / "run.json").write_bytes((ran / "run.json").read_bytes())
    packed = gzip.compress((ran / "rows.jsonl").read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    assert Run.read(tmp_path).rows == run.rows
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz' is damaged"):
        Run.read(tmp_path)


def of_items(run: Run, name: str, recipe: str, items: range) -> Run:
    """The part of a run with these items of each task, and this recipe."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        got = names.setdefault((row["task"], row["mode"]), [])
        got += [row["item"]] * (row["item"] not in got)
    rows = [
        row
        for row in run.rows
        if row["recipe"] in ("full", "none", recipe)
        and names[row["task"], row["mode"]].index(row["item"]) in items
    ]
    return Run.made_of(name, {**run.settings, "recipes": ["full", recipe]}, run.facts, rows, [])


def test_runs_of_other_recipes_on_the_same_items_are_joined(run):
    one = of_items(run, "one", "h2o@0.3", range(3))
    other = of_items(run, "other", "streaming_llm@90", range(1, 4))
    joined = join([one, other])
    assert joined.name == "one + other"
    assert joined.settings["recipes"] == ["full", "h2o@0.3", "streaming_llm@90"]
    wanted = [row for row in run.rows if row in one.rows or row["recipe"] == "streaming_llm@90"]
    shared = {(r["task"], r["item"]) for r in one.rows} & {
        (r["task"], r["item"]) for r in other.rows
    }
    wanted = [row for row in wanted if (row["task"], row["item"]) in shared]
    assert sorted(map(str, joined.rows)) == sorted(map(str, wanted))
    assert join([run]).rows == run.rows


def test_runs_under_other_conditions_are_not_joined(run):
    other = replace(run, name="other", settings={**run.settings, "seed": 7})
    with pytest.raises(ValueError, match=r"differ in seed \(0 and 7\); only runs of the same"):
        join([run, other])
    apart = [
        of_items(run, name, "h2o@0.3", items)
        for name, items in (("one", range(2)), ("two", range(2, 4)))
    ]
    with pytest.raises(ValueError, match="the runs one, two have no item in common"):
        join(apart)


def test_another_recipe_than_the_full_cache_can_be_the_measure(run):
    seen = run.against("h2o@0.3")
    for one, usual in zip(seen.scores, run.scores, strict=True):
        assert (one.score, one.full, one.skill) == (usual.score, usual.full, usual.skill)
        if one.recipe == "h2o@0.3":
            assert one.difference == Interval(0.0, 0.0, 0.0)
    lines = shown(seen, width=140)
    assert "items, against h2o@0.3" in lines
    assert "minus full" not in lines
    (full, h2o) = (s.score.value for s in run.headline(*run.parts[0])[:2])
    assert seen.headline(*run.parts[0])[0].difference.value == pytest.approx(full - h2o)
    with pytest.raises(ValueError, match="no recipe 'tova@9' to compare with; it has full, h2o"):
        run.against("tova@9")


def test_every_number_leads_to_its_items(run):
    """A score's part, recipe and measure name a packed list, which holds every row of the run."""
    text = report_page(run, "kvhive report")
    packed = dict(re.findall(r'id="items-(\d+)"[^>]*>([^<]*)<', text))
    opened = {int(part): unpack(data)["rows"] for part, data in packed.items()}
    for row in run.rows:
        part = run.parts.index((row["task"], row["mode"]))
        held = opened[part][row["recipe"]][row["item"]]
        assert held[0] == row["scores"]
        assert held[2] == [row["kept"], row["bytes"]]
        assert [scores for scores, _ in held[1]] == [one["scores"] for one in row["probes"]]
    heads = set(re.findall(r'data-part="(\d+)" data-measure="([^"]*)"', text))
    scores = {(run.parts.index((one.task, one.mode)), one.measure.name) for one in run.scores}
    assert {(int(part), measure) for part, measure in heads} == scores
    assert text.count('class="opens"') >= len(run.scores)


def test_items_are_packed_small_and_the_same_each_time(run):
    rows = run.of(*run.parts[0])
    packed = pack(rows)
    assert packed == pack(rows)
    assert len(packed) < len(json.dumps(rows)) / 3
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", packed)


def test_the_page_of_a_real_run_works_in_a_browser(run, visit):
    page = visit(report_page(run, "kvhive report"))
    page.locator("#board thead button").nth(1).click()
    assert page.locator("#board tbody th").first.inner_text() == "full"  # most kept first
    page.locator("tr[data-recipe='h2o@0.3'] .opens").first.click()
    page.locator("#items-list tbody tr").first.wait_for()
    assert page.locator("#items-list tbody tr").count() == 6
    shown = page.inner_text("#items-list")
    row = next(row for row in run.rows if row["recipe"] == "h2o@0.3")
    assert row["item"] in shown
    assert f"bytes {row['bytes']}" in shown


def test_heat_maps_are_length_by_depth():
    def row(recipe: str, length: int, depth: float, score: float) -> dict[str, Any]:
        probe = {"scores": {"exact": score}, "facts": {"depth": depth}}
        return {"recipe": recipe, "facts": {"length": length}, "probes": [probe]}

    rows = [row("full", 512, 0.0, 1.0), row("full", 1024, 0.0, 0.0), row("full", 512, 1.0, 0.5)]
    rows += [row("full", 512, 1.0, 0.0), row("a", 512, 0.5, 0.5)]
    full, other = heat_maps(rows, "exact")
    assert (full.recipe, full.lengths) == ("full", ["512", "1024"])
    assert full.rows == [
        ("0%", [HeatCell("1.00", 20), HeatCell("0.00", 0)]),
        ("100%", [HeatCell("0.25", 5), None]),
    ]
    assert other.rows == [("50%", [HeatCell("0.50", 10)])]
    assert heat_maps(rows, "choice") == []


def test_an_empty_run_is_told(ran, tmp_path):
    (tmp_path / "run.json").write_bytes((ran / "run.json").read_bytes())
    with pytest.raises(ValueError, match="holds no results yet"):
        Run.read(tmp_path)
