"""`kvhive evaluate` and `kvhive report` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvhive.cli import app

runner = CliRunner()


def call(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def evaluate(folder: Path, out: Path, *more: object) -> Result:
    task = ("--task", "passkey(lengths=(300,))")
    fast = ("--model", folder, "--dtype", "float32", "--data", "builtin", "--limit", 1)
    return call("evaluate", *fast, *task, "--out", out, *more)


def test_a_run_and_its_reports(folder, tmp_path):
    out = tmp_path / "run"
    done = evaluate(folder, out, "-r", "h2o@70", "--mode", "agnostic")
    assert done.exit_code == 0, done.output
    for words in ("passkey", "h2o@70", "no context", "leaderboard"):
        assert words in done.stdout
    assert "1 item is too few for intervals" in done.stderr.replace("\n", " ")
    assert "1 of 1 done" in done.stderr  # no terminal: plain lines
    assert "\x1b" not in done.stderr
    page, figures, tables = (tmp_path / f"r.{kind}" for kind in ("html", "csv", "md"))
    got = call("report", out, "--html", page, "--csv", figures, "--markdown", tables)
    assert got.exit_code == 0, got.output
    assert got.stdout == done.stdout
    assert "<title>run - kvhive report</title>" in page.read_text(encoding="utf-8")
    assert figures.read_text(encoding="utf-8").startswith("task,mode,recipe,measure")
    assert tables.read_text(encoding="utf-8").startswith("<!-- kvhive report -->\n# run\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "paskey"), "unknown task 'paskey'; did you mean: passkey"),
        (("--recipe", "hto@0.4"), "unknown policy 'hto'"),
        (("--mode", "awake"), "unknown mode 'awake'"),
        (("--data", "/no/where"), "there is no data folder"),
        (("--mode", "stream"), "has no mode stream; it has agnostic and aware"),
        (("-t", "verbatim", "--mode", "aware"), "task verbatim has no mode aware; it has agnostic"),
        (("--seed", 10**23), "Invalid value for '--seed'"),
        (("--threads", 100_000), "Invalid value for '--threads'"),
        (("--jobs", 10**6), "Invalid value for '--jobs'"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, words, message):
    failed = evaluate(folder, tmp_path / "run", *words)
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.output


def test_missing_data_says_what_to_do(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("KVHIVE_DATA", raising=False)
    failed = call("evaluate", "--model", folder, "-t", "qa10", "--out", tmp_path / "run")
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: task qa10: no data was given for 'qa10_nq/gold_at_0'")
    for way in ("--data FOLDER", "--data hub", "--data builtin", "--task generated"):
        assert way in failed.stderr
    assert not (tmp_path / "run").exists()


def test_json_and_quiet(folder, tmp_path):
    words = ("-r", "h2o@70", "--mode", "agnostic", "--json", "--quiet")
    done = evaluate(folder, tmp_path / "run", *words)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["complete"] is True
    assert {one["recipe"] for one in found["scores"]} == {"full", "h2o@70", "none"}


def test_a_report_of_nothing(tmp_path):
    failed = call("report", tmp_path)
    assert failed.exit_code == 2
    assert "is not the folder of a run" in " ".join(failed.stderr.split())
