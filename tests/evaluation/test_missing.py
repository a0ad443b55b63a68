"""Unfinished runs say what is missing, in every form of report; whole ones say nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from kvhive.cli import app
from kvhive.evaluation.report.csv import as_csv
from kvhive.evaluation.report.join import join
from kvhive.evaluation.report.json import as_json
from kvhive.evaluation.report.markdown import as_markdown
from kvhive.evaluation.report.missing import Missing, missing
from kvhive.evaluation.report.page import report_page
from kvhive.evaluation.report.run import Run
from kvhive.evaluation.report.table import leaderboard, unfinished
from tests.evaluation.test_results import FACTS, SETTINGS

RECIPES = ("full", "h2o@0.4", "none")
Row = dict[str, object]


def row(item: int, recipe: str, task: str = "kv", mode: str = "aware") -> Row:
    got = {"task": task, "mode": mode, "item": str(item), "recipe": recipe, "cluster": str(item)}
    score = {"choice": {"full": 1.0, "none": 0.0}.get(recipe, 0.5)}
    held = {"seen": 10, "kept": 4.0, "bytes": 40, "full_bytes": 100}
    return {**got, **held, "scores": score, "probes": [{"scores": score, "facts": {}}], "facts": {}}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(rows, limit=6, ...)`: the folder of a run with these rows and settings."""

    def written(rows: list[Row], items: dict[str, int] | None = None, **settings: object) -> Path:
        facts = {**FACTS, "items": items} if items is not None else FACTS
        run = {"settings": {**SETTINGS, **settings}, "facts": facts}
        (tmp_path / "run.json").write_text(json.dumps(run))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return tmp_path

    return written


def rows_of(items: int, task: str = "kv", mode: str = "aware") -> list[Row]:
    return [row(item, recipe, task, mode) for item in range(items) for recipe in RECIPES]


def shown(*parts: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def test_a_whole_run_has_nothing_missing(write):
    run = Run.read(write(rows_of(6), limit=6))
    assert run.missing == []
    assert run.unfinished() == []
    assert unfinished(run) == []
    assert "unfinished" not in as_markdown(run, "") + report_page(run, "")
    assert json.loads(as_json(run))["complete"] is True


def test_tasks_modes_and_items_that_are_missing_are_counted(write):
    both = {"tasks": ["kv", "passkey"], "modes": ["agnostic", "aware"], "limit": 6}
    run = Run.read(write(rows_of(2), **both))
    assert run.missing == [
        Missing("kv", "agnostic", None, 0, 6),
        Missing("kv", "aware", None, 2, 6),
        Missing("passkey", "agnostic", None, 0, 6),
        Missing("passkey", "aware", None, 0, 6),
    ]
    assert str(run.missing[1]) == "kv (aware): 2 of 6 items"


def test_a_recipe_that_lacks_rows_is_named(write):
    rows = [one for one in rows_of(6) if (one["recipe"], one["item"]) != ("h2o@0.4", "3")]
    run = Run.read(write(rows, limit=6))
    assert run.missing == [Missing("kv", "aware", "h2o@0.4", 5, 6)]
    assert str(run.missing[0]) == "kv (aware), h2o@0.4: 5 of 6 items"


def test_data_that_hold_fewer_items_than_the_limit_are_not_missing(write):
    assert Run.read(write(rows_of(5), items={"kv": 5}, limit=9)).missing == []


def test_streams_count_in_their_own_mode():
    settings = {**SETTINGS, "tasks": ["wikitext"], "modes": ["agnostic", "aware"]}
    assert missing(settings, FACTS, []) == [Missing("wikitext", "stream", None, 0, 3)]


def test_every_form_of_report_says_so(write):
    run = Run.read(write(rows_of(2), tasks=["kv", "passkey"], limit=6))
    said = ("kv (aware): 2 of 6 items", "passkey (aware): 0 of 6 items")
    texts = (shown(*unfinished(run)), as_markdown(run, ""), report_page(run, ""))
    for text in texts:
        assert all(one in text for one in ("unfinished", *said))
    assert texts[1].index("unfinished") < texts[1].index("## leaderboard")
    assert texts[2].index("unfinished") < texts[2].index("Leaderboard")
    lines = list(csv.DictReader(io.StringIO(as_csv(run))))
    assert [(one["task"], one["items"], one["items_wanted"]) for one in lines] == [
        *[("kv", "2", "6")] * 3,
        ("passkey", "0", "6"),
    ]
    found = json.loads(as_json(run))
    assert found["complete"] is False
    assert found["missing"][1] == {
        **{"task": "passkey", "mode": "aware", "recipe": None},
        **{"items": 0, "wanted": 6},
    }


def test_too_few_items_give_no_interval_and_no_leaderboard(write):
    run = Run.read(write(rows_of(2), limit=2))
    assert "± -" in as_markdown(run, "")
    assert "± 0" not in as_markdown(run, "") + report_page(run, "")
    assert "no leaderboard: none of the tasks can show a loss" in shown(leaderboard(run, 100))
    assert "no leaderboard" in as_markdown(run, "")
    assert "no leaderboard" in report_page(run, "")
    assert json.loads(as_json(run))["leaderboard"] is None
    (why,) = run.unclear()
    assert why.startswith("kv (aware): 2 items are too few for intervals")
    (line, *_) = csv.DictReader(io.StringIO(as_csv(run)))
    assert (line["score"], line["score_low"], line["score_high"]) == ("1", "", "")


def test_what_one_of_joined_runs_lacks_is_told(write):
    run = Run.read(write(rows_of(5), limit=6))
    assert join([run, run]).missing == run.missing


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_the_command_warns_on_top_and_speaks_json(write):
    folder = write(rows_of(5), limit=6)
    got = report(folder)
    assert got.exit_code == 0, got.output
    assert got.stdout.startswith("this run is unfinished")
    assert report(folder, "--quiet").stderr == ""
    found = json.loads(report(folder, "--json").stdout)
    assert [one["recipe"] for one in found["leaderboard"]] == ["full", "h2o@0.4"]
    (skill,) = [one["skill"] for one in found["scores"] if one["recipe"] == "h2o@0.4"]
    assert skill == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert {one["measure"] for one in found["scores"]} == {"choice"}


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("run.json", b"\x00\xff", "run.json' is damaged, it is not JSON"),
        ("rows.jsonl", b"\x00\xff\n{}\n", "rows.jsonl' is damaged in line 1: expected a result"),
        ("rows.jsonl", b'{"task": 3}\n', "line 1: the record has no field 'item'"),
        ("rows.jsonl", b'{"task"', "holds no results yet"),
    ],
)
def test_a_damaged_folder_is_one_sentence(write, name, contents, message):
    folder = write(rows_of(1))
    (folder / name).write_bytes(contents)
    got = report(folder)
    assert got.exit_code == 2
    assert got.stdout == ""
    assert got.stderr.startswith("error: ")
    assert got.stderr.count("\n") == 1
    assert message in got.stderr


def test_rows_of_an_unknown_task_are_told_by_their_line(write):
    got = report(write([*rows_of(1), row(0, "full", "paskey")]))
    assert got.exit_code == 2
    assert "rows.jsonl', line 4, field 'task': unknown task 'paskey'" in got.stderr
