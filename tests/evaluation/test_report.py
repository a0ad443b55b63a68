"""Reports of a small run: table, CSV, and the page in a real browser."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvhive.cli import app
from kvhive.evaluation.report.charts import Point, heat_map, quality_plot, ticks, turn_plot
from kvhive.evaluation.report.csv import COLUMNS, as_csv
from kvhive.evaluation.report.join import join
from kvhive.evaluation.report.markdown import as_markdown
from kvhive.evaluation.report.page import report_page
from kvhive.evaluation.report.run import Run
from kvhive.evaluation.report.table import leaderboard, task_tables
from kvhive.evaluation.scheduler import evaluate
from kvhive.evaluation.settings import Settings
from kvhive.evaluation.statistics import Interval

RECORDED = Path(__file__).parents[2] / "docs" / "results" / "stream_buzz"
BROWSERS = [
    name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)
]
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
    for table in (*task_tables(run), leaderboard(run)):
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


class Page(HTMLParser):
    """Ids, links to items, and whatever is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.items: list[list[str]] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "data-items" in given:
            self.items.append(json.loads(given["data-items"]))
        self.fetched += [given[name] for name in ("src", "srcset") if name in given]
        if tag == "link" or (tag == "script" and "src" in given):
            self.fetched.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_markdown_has_a_line_for_every_recipe_of_every_task(run):
    text = as_markdown(run, "kvhive report here")
    assert text.startswith(f"# {run.name}\n")
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


def test_the_page_stands_alone_and_is_well_formed(run):
    text = report_page(run, "kvhive report 'a<b>'")
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "<b>" not in text.replace("a&lt;b&gt;", "")
    assert "http" not in re.sub(r"http://www\.w3\.org\S*", "", text)


def test_every_number_leads_to_its_items(run):
    text = report_page(run, "kvhive report")
    data = json.loads(re.search(r'id="run">(.*?)</script>', text, re.S)[1])
    known = {(task, mode, recipe) for task, mode, recipe, *_ in data}
    page = Page(text)
    assert {tuple(key[:3]) for key in page.items} == known
    for task, mode, recipe, measure in page.items:
        part = [row for row in data if (row[0], row[1], row[2]) == (task, mode, recipe)]
        assert any(measure in row[4] for row in part)


def test_texts_cannot_break_out_of_the_page(run):
    nasty = replace(run, rows=[dict(row) for row in run.rows])
    nasty.rows[0]["probes"] = [{"scores": {}, "facts": {}, "text": "</script><script>x<!--"}]
    text = report_page(nasty, "kvhive report")
    assert "</script><script>x" not in text
    assert Page(text).open == []


@pytest.mark.parametrize("browser", BROWSERS)
def test_the_page_renders_in_a_browser(run, tmp_path, browser):
    """Its continuations run to the end: the table sorts, and a number opens its items."""
    click = (
        "<script>document.querySelectorAll('#leaderboard button')[1].click();"
        "document.querySelector('[data-items]').click();"
        "document.body.dataset.rows = document.querySelectorAll('#items tbody tr').length;"
        "document.body.dataset.first = document.querySelector('#leaderboard tbody th').textContent;"
        "</script></body>"
    )
    text = report_page(run, "kvhive report").replace("</body>", click)
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'b'}"]
    result = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body = re.search(r"<body[^>]*>", result.stdout)[0]
    assert 'data-ready="yes"' in body
    assert 'data-rows="6"' in body
    assert 'data-first="full"' in body  # most kept first
    assert re.search(r"<dialog id=\"items\" open", result.stdout)
    assert 'aria-sort="descending"' in result.stdout


def test_plots_mark_the_front_and_show_intervals():
    points = [
        Point("a&b", "#111", 1.0, Interval(0.2, 0.1, 0.3), True),
        Point("c", "#222", 2.0, Interval(0.1, 0.0, 0.2), False),
    ]
    drawn = quality_plot(points, "MiB", "exact")
    assert drawn.count('class="ring"') == 1
    assert drawn.count('class="whisker"') == 2
    assert "a&amp;b: 0.2 (0.1 .. 0.3)" in drawn


def test_turns_are_lines():
    drawn = turn_plot(
        {"full": {1: 0.5, 2: 0.4}, "a": {1: 0.3, 2: 0.3}}, {"full": "#1", "a": "#2"}, "x"
    )
    assert drawn.count('class="line"') == 2


def test_heat_maps_are_length_by_depth():
    drawn = heat_map({(512.0, 0.0): 1.0, (1024.0, 0.0): 0.0, (512.0, 1.0): 0.5}, "full", 0.0, 1.0)
    assert drawn.count("<tr>") == 3
    assert "--a:100%" in drawn
    assert "--a:50%" in drawn
    assert "<td></td>" in drawn


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.13, 0.21), (-3.0, 900.0), (2.0, 2.0)])
def test_ticks_are_few_and_round(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 10
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)


def test_an_empty_run_is_told(ran, tmp_path):
    (tmp_path / "run.json").write_bytes((ran / "run.json").read_bytes())
    with pytest.raises(ValueError, match="holds no results yet"):
        Run.read(tmp_path)
