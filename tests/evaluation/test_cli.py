"""`kvhive evaluate` and `kvhive report` as commands."""

from __future__ import annotations

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
    assert "within 4 standard errors of the floor" in done.stderr.replace("\n", " ")
    page, figures, tables = (tmp_path / f"r.{kind}" for kind in ("html", "csv", "md"))
    got = call("report", out, "--html", page, "--csv", figures, "--markdown", tables)
    assert got.exit_code == 0, got.output
    assert got.stdout == done.stdout
    assert "<title>run - kvhive report</title>" in page.read_text(encoding="utf-8")
    assert figures.read_text(encoding="utf-8").startswith("task,mode,recipe,measure")
    assert tables.read_text(encoding="utf-8").startswith("# run\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "paskey"), "unknown task 'paskey'; did you mean: passkey"),
        (("--recipe", "hto@0.4"), "unknown policy 'hto'"),
        (("--mode", "awake"), "unknown mode 'awake'"),
        (("--data", "/no/where"), "there is no data folder"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, words, message):
    failed = evaluate(folder, tmp_path / "run", *words)
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.output


def test_missing_data_says_what_to_do(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("KVHIVE_DATA", raising=False)
    failed = call("evaluate", "--model", folder, "--out", tmp_path / "run")
    assert failed.exit_code == 2
    assert "--data hub" in " ".join(failed.stderr.split())


def test_a_report_of_nothing(tmp_path):
    failed = call("report", tmp_path)
    assert failed.exit_code == 2
    assert "is not the folder of a run" in " ".join(failed.stderr.split())
