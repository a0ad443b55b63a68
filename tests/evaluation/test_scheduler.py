"""Whole runs: the same file twice, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from kvhive.evaluation import workers as workers_module
from kvhive.evaluation.measures import EXACT, NLL
from kvhive.evaluation.results import ROWS, read_rows, read_run
from kvhive.evaluation.scheduler import State, evaluate
from kvhive.evaluation.settings import Settings, Unit
from kvhive.evaluation.tasks import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.evaluation.workers import Died, Failed, ProcessPool

TASK = "passkey(lengths=(300,))"
STREAM = "wikitext(tokens=300, skip=100)"


@pytest.fixture
def settings(folder: Path) -> Settings:
    return Settings(
        model=str(folder),
        recipes=("h2o@70", "streaming_llm@0.4"),
        tasks=(TASK, STREAM),
        limit=2,
        data="builtin",
        dtype="float32",
    )


def rows_file(folder: Path) -> bytes:
    return (folder / ROWS).read_bytes()


def test_every_item_has_a_row_for_every_recipe_and_the_floor(settings, tmp_path):
    out = evaluate(settings, tmp_path / "run")
    rows = read_rows(out)
    keys = [(row["task"], row["mode"], row["item"], row["recipe"]) for row in rows]
    recipes = ["full", "h2o@70", "streaming_llm@0.4", "none"]
    parts = [
        (TASK, "agnostic", "passkey"),
        (TASK, "aware", "passkey"),
        (STREAM, "stream", "wikitext"),
    ]
    assert keys == [
        (task, mode, f"{name}-{number}", recipe)
        for task, mode, name in parts
        for number in range(2)
        for recipe in recipes
    ]
    for row in rows:
        assert row["scores"]
        assert row["probes"]
        if row["recipe"] == "full":
            assert row["kept"] == row["seen"]
            assert row["bytes"] >= row["full_bytes"]
        if row["recipe"] == "h2o@70":
            assert row["kept"] == 70
            assert row["bytes"] < row["full_bytes"]
            assert row["kept_end"] <= 70


def test_the_run_is_recorded(settings, tmp_path):
    run = read_run(evaluate(replace(settings, tasks=(TASK,), seed=5), tmp_path / "run"))
    assert run["settings"]["seed"] == 5
    assert run["settings"]["recipes"] == ["full", "h2o@70", "streaming_llm@0.4"]
    assert run["settings"]["tasks"] == [TASK]
    assert len(run["facts"]["model_sha256"]) == 64
    assert run["facts"]["data"] == {"books": "builtin:1"}
    assert {"kvhive", "torch", "transformers", "python", "threads"} <= run["facts"].keys()


def test_two_runs_give_the_same_file(settings, tmp_path):
    first = evaluate(settings, tmp_path / "one")
    second = evaluate(settings, tmp_path / "two")
    assert rows_file(first) == rows_file(second)
    other = evaluate(replace(settings, seed=1), tmp_path / "three")
    assert rows_file(first) != rows_file(other)


def test_a_killed_run_goes_on(settings, tmp_path):
    whole = evaluate(settings, tmp_path / "whole")
    states: list[State] = []

    def kill_after_two(state: State) -> None:
        if state.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(settings, tmp_path / "run", progress=kill_after_two)
    assert len(read_rows(tmp_path / "run")) == 2 * 4
    # A unit of which only some rows were written, and a torn line.
    lines = rows_file(tmp_path / "run").splitlines(keepends=True)
    (tmp_path / "run" / ROWS).write_bytes(b"".join(lines[:6]) + b'{"task": "pass')
    evaluate(settings, tmp_path / "run", progress=states.append)
    assert [state.done for state in states if not state.note] == [1, 2, 3, 4, 5, 6]
    assert states[-1].done == states[-1].total == 6
    assert rows_file(tmp_path / "run") == rows_file(whole)


def test_a_finished_run_is_left_alone(settings, tmp_path):
    out = evaluate(settings, tmp_path / "run")
    before, states = rows_file(out), []
    evaluate(settings, out, progress=states.append)
    assert rows_file(out) == before
    assert [state.done for state in states if not state.note] == [6]


def test_another_run_in_the_same_folder_is_refused(settings, tmp_path):
    one = replace(settings, tasks=(TASK,), limit=1)
    out = evaluate(one, tmp_path / "run")
    before = rows_file(out)
    with pytest.raises(ValueError, match="holds a run with limit 1, not 2"):
        evaluate(replace(one, limit=2), out)
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1"):
        evaluate(replace(one, seed=1), out)
    assert rows_file(out) == before


def test_progress_tells_the_time_left(settings, tmp_path):
    states: list[State] = []
    evaluate(replace(settings, tasks=(TASK,)), tmp_path / "run", progress=states.append)
    got = [state for state in states if not state.note]
    assert [state.done for state in got] == [0, 1, 2, 3, 4]
    assert got[0].left is None
    assert got[-1].left == 0
    assert any("made up" in state.note for state in states)


def test_processes_give_the_same_file(settings, tmp_path):
    settings = replace(settings, threads=1)
    alone = evaluate(settings, tmp_path / "alone")
    several = evaluate(settings, tmp_path / "several", jobs=2)
    assert rows_file(alone) == rows_file(several)


def test_a_killed_worker_loses_nothing(settings, tmp_path, monkeypatch):
    """The first worker that has answered a unit is shot while it works at its next."""
    settings = replace(settings, threads=1, tasks=(TASK,))
    whole = evaluate(settings, tmp_path / "whole")
    shot: list[int] = []

    class Range(ProcessPool):
        def wait(self, busy):
            if len(shot) == 0 and len(read_rows(tmp_path / "run")) >= 4:
                shot.append(busy[0].process.pid)
                os.kill(busy[0].process.pid, signal.SIGKILL)
            return super().wait(busy)

    monkeypatch.setattr("kvhive.evaluation.scheduler.ProcessPool", Range)
    out = evaluate(settings, tmp_path / "run", jobs=2)
    assert shot
    assert rows_file(out) == rows_file(whole)


class _Fragile:
    """A pool whose workers die at one unit, always; or at everything."""

    size = 1
    notes = ()

    def __init__(self, inner, number):
        self.inner, self.number, self.unit, self.started = inner, number, None, 0
        self.closed = False

    def start(self):
        self.started += 1
        return self

    def send(self, unit):
        self.unit = unit
        self.inner.send(unit)

    def stop(self):
        """Nothing."""

    def close(self):
        self.closed = True

    def wait(self, busy):
        if self.number is None or (self.unit is not None and self.unit.number == self.number):
            return self, Died()
        return self, self.inner.wait(busy)[1]


def test_a_unit_that_kills_every_worker_ends_the_run_with_a_sentence(
    settings, tmp_path, monkeypatch
):
    settings = replace(settings, tasks=(TASK,), modes=("agnostic",)).checked()
    fragile = _Fragile(workers_module.InProcess(settings), 1)
    monkeypatch.setattr("kvhive.evaluation.scheduler._pool", lambda *args: fragile)
    with pytest.raises(OSError, match=r"3 workers died one after another at .*, item 1"):
        evaluate(settings, tmp_path / "run")
    assert fragile.started == 3
    assert fragile.closed
    assert {row["item"] for row in read_rows(tmp_path / "run")} == {"passkey-0"}


def test_workers_that_never_get_to_the_plan_end_the_run_with_a_sentence(
    settings, tmp_path, monkeypatch
):
    fragile = _Fragile(None, None)
    fragile.inner = type("Never", (), {"send": lambda self, unit: None})()
    monkeypatch.setattr("kvhive.evaluation.scheduler._pool", lambda *args: fragile)
    with pytest.raises(OSError, match="3 workers died one after another while they loaded the"):
        evaluate(settings, tmp_path / "run")
    assert fragile.started == 3


def test_a_workers_error_is_told(settings, tmp_path):
    settings = replace(settings, data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="there is no data folder"):
        evaluate(settings, tmp_path / "run", jobs=2)


def test_errors_that_cannot_travel_become_text():
    class Odd(Exception):
        pass

    assert isinstance(Failed(workers_module.sendable(Odd("x"))).error, RuntimeError)
    error = ValueError("y")
    assert workers_module.sendable(error) is error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("paskey",)}, "unknown task 'paskey'; did you mean: passkey"),
        ({"tasks": ()}, "no task was named"),
        ({"recipes": ("hto@0.4",)}, "unknown policy 'hto'"),
        ({"modes": ("awake",)}, "unknown mode 'awake'"),
        ({"modes": ()}, "no mode was named; known: agnostic"),
        ({"limit": 0}, "limit must be between 1 and 1000000, got 0"),
        ({"block": 0}, "block must be between 1"),
        (
            {"tasks": ("passkey(lengths=(300, 9000))",), "limit": 0},
            "limit must be between 1 and 1000000, got 0",
        ),
    ],
)
def test_bad_settings_are_told_before_anything_runs(settings, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(settings, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_documents_longer_than_the_model_are_left_out(settings, tmp_path):
    states: list[State] = []
    mixed = "passkey(lengths=(300, 7000), depths=(0.5,))"
    settings = replace(settings, tasks=(mixed,), modes=("agnostic",))
    out = evaluate(settings, tmp_path / "run", progress=states.append)
    assert {row["item"] for row in read_rows(out)} == {"passkey-0"}
    assert any("items left out, more than the model's 6,000 tokens: 1" in s.note for s in states)
    with pytest.raises(ValueError, match="has no items: all are too long for the model"):
        evaluate(replace(settings, tasks=("passkey(lengths=(7000,))",)), tmp_path / "other")


def test_a_task_without_data_is_told(settings, tmp_path):
    with pytest.raises(ValueError, match=r"fidelity\(tokens=99999\) has no items: its data holds"):
        evaluate(replace(settings, tasks=("fidelity(tokens=99999)",)), tmp_path / "run")


def test_jobs_are_checked(settings, tmp_path):
    with pytest.raises(ValueError, match="jobs must be between 1 and 1024, got 0"):
        evaluate(settings, tmp_path / "run", jobs=0)


def test_caches_can_be_held_after_the_prompt(settings, tmp_path):
    settings = replace(settings, tasks=(TASK,), modes=("agnostic",), limit=1)
    rows = {
        hold: read_rows(evaluate(replace(settings, hold=hold), tmp_path / str(hold)))
        for hold in (False, True)
    }
    assert {row["decode"] for row in rows[True]} == {"hold"}
    for stepped, held in zip(rows[False], rows[True], strict=True):
        assert stepped["kept"] == held["kept"]
        added = held["seen_end"] - held["seen"]
        assert held["kept_end"] == held["kept"] + added  # also of recipes that evict otherwise
    evicting = [
        row["kept_end"] < row["kept"] + row["seen_end"] - row["seen"] for row in rows[False]
    ]
    assert any(evicting)


def test_prompts_can_be_read_in_blocks(settings, tmp_path):
    settings = replace(settings, tasks=(TASK,), modes=("agnostic",), limit=1)
    whole = read_rows(evaluate(settings, tmp_path / "whole"))
    blocks = read_rows(evaluate(replace(settings, block=32), tmp_path / "blocks"))
    assert {row["prefill"] for row in whole} == {"whole"}
    assert {row["prefill"] for row in blocks} == {"block 32"}
    for one, other in zip(whole, blocks, strict=True):
        if one["recipe"] in ("full", "none"):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-3)


@dataclass(frozen=True)
class Greeting(Task):
    """A task as a user would add it."""

    measures = (EXACT, NLL)
    modes: ClassVar = ("agnostic",)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Three of them."""
        for number in range(3):
            name = context.random("greeting", number).choice(["Ann", "Bob", "Cid"])
            probe = Probe(" Who is here?", cue="Here is", target=f" {name}")
            yield Item(f"hello-{number}", f"Hello, {name}!" * 20, "Hello!", (probe,))


def test_a_new_task_is_found_by_its_name(settings, tmp_path, monkeypatch):
    known = dict(TASKS._classes)
    monkeypatch.setattr(TASKS, "_classes", known)
    TASKS.register("greeting")(Greeting)
    out = evaluate(replace(settings, tasks=("greeting",), limit=9), tmp_path / "run")
    rows = read_rows(out)
    assert len(rows) == 3 * 4
    assert set(rows[0]["scores"]) == {"exact", "nll"}


def test_units_are_named():
    assert str(Unit("kv", "aware", 3)) == "kv aware, item 3"


def test_rows_are_plain_json(settings, tmp_path):
    out = evaluate(replace(settings, tasks=(TASK,), limit=1), tmp_path / "run")
    for line in rows_file(out).splitlines():
        assert json.dumps(json.loads(line), separators=(",", ":")).encode() == line
