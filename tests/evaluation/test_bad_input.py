"""`kvhive evaluate` and `report` with input that cannot work: one sentence, nothing lost.

Settings: test_cli.py, test_scheduler.py; data files: test_data.py; a run's folder: test_results.py.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvhive.cli import app
from kvhive.evaluation.data import CATALOGUE
from kvhive.evaluation.results import LOCK, ROWS, ResultsFolder, read_rows
from kvhive.evaluation.tasks import TASKS

PATIENCE = 300  # seconds after which a process is taken to be stuck
ROWS_EACH = 3  # the full cache, the recipe, the floor
PASSKEY = "passkey(lengths=(300,))"
ARTICLE = {"id": "1", "article": "Bees sleep at night. So do boats.", "summary": "Bees sleep."}


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


Evaluate = Callable[..., Result]


@pytest.fixture
def options(folder: Path) -> list[str]:
    """A quick run: one recipe, one mode."""
    fast = ["--model", str(folder), "--dtype", "float32", "--threads", "1"]
    return [*fast, "-r", "h2o@70", "--mode", "agnostic"]


@pytest.fixture
def evaluate(options: list[str], tmp_path: Path) -> Evaluate:
    """`evaluate("--task", ...)` into the folder `run`."""

    def run(*words: object, data: object = "builtin") -> Result:
        return call("evaluate", *options, "--data", data, "--out", tmp_path / "run", *words)

    return run


def sentence(result: Result) -> str:
    """The error, which is all there is besides notes."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *notes, error = result.stderr.splitlines()
    assert all(line.startswith("note: ") for line in notes)
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("-t", "passkey(lengths=())"),
            "lengths must be a list of whole numbers, as in [1, 2], got ()",
        ),
        (("-t", PASSKEY, "--mode", ""), "no mode was named; known: agnostic, aware, stream"),
        (("-t", PASSKEY, "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("-t", PASSKEY, "-r", "h2o@70.0"), "a share must lie in (0, 1], got 70"),
        (("-t", "passkey(lengths=(9000,))"), "has no items: all are too long for the model"),
    ],
)
def test_what_cannot_be_run(evaluate, words, message):
    assert message in sentence(evaluate(*words))


def test_damaged_weights(evaluate, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        size = 2000 if path.suffix == ".safetensors" else None
        (broken / path.name).write_bytes(path.read_bytes()[:size])
    got = sentence(evaluate("-t", PASSKEY, "--model", broken))
    assert "broken' cannot be used" in got
    assert "get it again" in got


def write(place: Path, *records: object) -> Path:
    """A data folder with an xsum of these records."""
    path = place / CATALOGUE["xsum"].file
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))
    return place


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ((), "is empty: it holds no records"),
        (
            ({"id": "1", "article": "Bees."},),
            "line 1: the record has no field 'summary'; expected id, article, summary",
        ),
        ((ARTICLE, ARTICLE), "several items have the id '1'; each needs one"),
    ],
)
def test_data_that_cannot_be_used(evaluate, tmp_path, records, message):
    data = write(tmp_path / "data", *records)
    assert message in sentence(evaluate("-t", "xsum(write=False)", data=data))


def test_data_that_is_less_or_other_than_expected_is_noted(evaluate, tmp_path):
    result = evaluate("-t", "xsum(write=False)", data=write(tmp_path / "data", ARTICLE))
    assert result.exit_code == 0
    assert "items there are, fewer than the limit: 1" in result.stderr
    assert "is not the published file" in result.stderr


def test_a_run_in_a_folder_in_use(evaluate, tmp_path):
    with ResultsFolder(tmp_path / "run"):
        assert "another run is writing to" in sentence(evaluate("-t", PASSKEY))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_file_size_limit_loses_nothing(options, tmp_path):
    """As a full disk: a process whose files may have 4 KiB, then one that may write more."""
    out = tmp_path / "run"
    words = [*options, "--data", "builtin", "-t", PASSKEY, "--limit", "6", "--out", str(out)]
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from kvhive.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "evaluate", *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nothing is lost: make room and run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    kept = (out / ROWS).read_bytes()
    assert 0 < len(read_rows(out)) < 6 * ROWS_EACH
    assert call("evaluate", *words).exit_code == 0
    assert (out / ROWS).read_bytes().startswith(kept)
    assert len(read_rows(out)) == 6 * ROWS_EACH


_WAITING = """
import time
from dataclasses import dataclass
from pathlib import Path
from kvhive.evaluation.tasks import TASKS
from kvhive.evaluation.tasks.passkey import Passkey

@TASKS.register("waiting")
@dataclass(frozen=True)
class Waiting(Passkey):
    def run(self, tested, item, mode):
        while item.id == "passkey-2" and not Path(__file__).with_name("go").exists():
            time.sleep(0.02)
        return super().run(tested, item, mode)
"""


@pytest.fixture
def waiting(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of four items that stands still at the third until there is a file `go`."""
    monkeypatch.setattr(TASKS, "_classes", dict(TASKS._classes))
    plugin = tmp_path / "waiting.py"
    plugin.write_text(_WAITING)
    task = ["--plugin", str(plugin), "-t", "waiting(lengths=(300,))", "--limit", "4"]
    return ["evaluate", *options, "--data", "builtin", *task]


@contextmanager
def standing_still(words: list[str], out: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, at its third item; nothing is left of it afterwards."""
    command = [sys.executable, "-m", "kvhive", *words, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    begun = {"start_new_session": True, "preexec_fn": hear_interrupts}
    with subprocess.Popen(command, text=True, **pipes, **begun) as process:
        try:
            while process.poll() is None and len(read_rows(out)) < 2 * ROWS_EACH:
                time.sleep(0.05)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def hear_interrupts() -> None:
    """A background job of a shell, as CI may be, ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_run_says_so_and_goes_on(waiting, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    with standing_still(waiting, out) as process:
        os.killpg(process.pid, signal.SIGINT)
        got, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert got == ""
    assert "note: stopped; what is done is in" in errors
    assert "Traceback" not in errors
    assert len(read_rows(out)) == 2 * ROWS_EACH
    (tmp_path / "go").touch()
    assert call(*waiting, "--out", out).exit_code == 0
    assert call(*waiting, "--out", whole).exit_code == 0
    assert (out / ROWS).read_bytes() == (whole / ROWS).read_bytes()


def test_a_killed_run_leaves_no_workers(waiting, tmp_path):
    """They hold its pipes too, which end only with the last of them."""
    out = tmp_path / "run"
    with standing_still([*waiting, "--jobs", "2"], out) as process:
        process.kill()
        got, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert got == ""
    assert "Traceback" not in errors
    assert len(read_rows(out)) >= 2 * ROWS_EACH


def test_a_report_of_what_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        assert "is not the folder of a run" in sentence(call("report", tmp_path / name))
