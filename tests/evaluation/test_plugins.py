"""Tasks from outside the package, as docs/new_task.md tells."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvhive.cli import app
from kvhive.evaluation.results import read_rows, read_run
from kvhive.evaluation.tasks import TASKS
from kvhive.plugins import load_plugins

PAGE = Path(__file__).parents[2] / "docs" / "new_task.md"


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """`forget()`: as in a new process, no plugin is known; so too after the test."""
    known = dict(TASKS._classes)

    def forgotten() -> None:
        TASKS._classes.clear()
        TASKS._classes.update(known)
        for name in [name for name in sys.modules if name.startswith("kvhive_plugin_")]:
            del sys.modules[name]

    yield forgotten
    forgotten()


@pytest.fixture
def diary(tmp_path: Path, forget: Callable[[], None]) -> Path:
    """The file that the page shows."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(source.splitlines()) < 60
    path = tmp_path / "diary.py"
    path.write_text(source, encoding="utf-8")
    return path


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def evaluate(folder: Path, out: Path, *more: object) -> Result:
    fast = ("--model", folder, "--dtype", "float32", "--data", "builtin", "--limit", 2)
    return call("evaluate", *fast, "-r", "h2o@70", "--threads", 1, "--out", out, *more)


def one_sentence(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_pages_task_runs_in_workers_and_is_reported(folder, tmp_path, diary, forget):
    out, tasks = tmp_path / "run", ("-t", "diary", "-t", "diary(people=4)")
    done = evaluate(folder, out, "--plugin", diary, *tasks, "--jobs", 2)
    assert done.exit_code == 0, done.output
    rows = read_rows(out)
    assert {row["task"] for row in rows} == {"diary", "diary(people=4)"}
    assert len(rows) == 2 * 2 * 2 * 3
    assert all(row["scores"].keys() == {"choice", "exact", "margin"} for row in rows)
    assert read_run(out)["facts"]["plugin_sha256"].keys() == {"diary.py"}
    forget()
    assert "the run had --plugin diary.py: give that here too" in one_sentence(call("report", out))
    got = call("report", out, "--plugin", diary)
    assert got.exit_code == 0, got.output
    assert "diary(people=4)" in got.stdout


def test_the_pages_task_checks_its_knobs(folder, tmp_path, diary):
    failed = evaluate(folder, tmp_path / "run", "--plugin", diary, "-t", "diary(people=11)")
    assert "diary: people must be between 1 and 10, got 11" in one_sentence(failed)


def test_a_run_goes_on_only_with_the_same_code(folder, tmp_path, diary, forget):
    words = (folder, tmp_path / "run", "--plugin", diary, "-t", "diary", "--mode", "agnostic")
    assert evaluate(*words).exit_code == 0
    before = read_rows(tmp_path / "run")
    forget()
    diary.write_text(diary.read_text(encoding="utf-8").replace("tea", "coffee"), encoding="utf-8")
    assert "holds a run with another plugin_sha256" in one_sentence(evaluate(*words))
    assert read_rows(tmp_path / "run") == before


def test_a_module_is_a_plugin_too(tmp_path, monkeypatch, forget):
    (tmp_path / "kvhive_plugin_of_mine.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugins(["kvhive_plugin_of_mine"]).keys() == {"kvhive_plugin_of_mine"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no such file"),
        ("def x(:\n", "SyntaxError: invalid syntax"),
        ("\nimport nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("a = 1\nb = a / 0\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "it ended the program"),
        (
            "from kvhive.evaluation.tasks import TASKS, Task\n"
            "@TASKS.register('passkey')\nclass Mine(Task):\n    pass\n",
            "task 'passkey' is registered twice",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_told(folder, tmp_path, forget, source, message):
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    got = one_sentence(evaluate(folder, tmp_path / "run", "--plugin", path, "-t", "passkey"))
    assert message in got
    assert str(path) in got
    assert not (tmp_path / "run").exists()


def test_a_module_that_is_not_there_is_told(folder, tmp_path):
    got = one_sentence(evaluate(folder, tmp_path / "run", "--plugin", "no_such_plugin"))
    assert "no plugin 'no_such_plugin': expected a file NAME.py, or a module" in got


BROKEN = """
from dataclasses import dataclass
from kvhive.evaluation.tasks import TASKS
from kvhive.evaluation.tasks.passkey import Passkey

@TASKS.register("broken")
@dataclass(frozen=True)
class Broken(Passkey):
    def {method}:
        {body}
"""


@pytest.mark.parametrize(
    ("method", "body", "message"),
    [
        ("items(self, context)", "yield {}['x']", "KeyError: 'x' (FILE, line 10)"),
        ("items(self, context)", "yield 3", "AttributeError: 'int' object has no"),
        ("items(self, context)", "raise ValueError('odd')", "ValueError: odd (FILE, line 10)"),
        ("items(self, context)", "return 3", "TypeError: 'int' object is not iterable (FILE)"),
        ("run(self, tested, item, mode)", "return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_of_a_plugins_task_is_told_as_its_own(
    folder, tmp_path, forget, method, body, message
):
    path = tmp_path / "mine.py"
    path.write_text(BROKEN.format(method=method, body=body))
    got = one_sentence(
        evaluate(folder, tmp_path / "run", "--plugin", path, "-t", "broken", "--quiet")
    )
    assert f"plugin '{path}' failed: " in got
    assert message.replace("FILE", str(path)) in got
    assert "a bug" not in got
