"""Give units to workers, write their rows, report how far it is. Nothing here knows a model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvhive.evaluation.engine import TRANSFORMERS
from kvhive.evaluation.engine_pool import EnginePool
from kvhive.evaluation.evaluator import Loaded, Plan, Row
from kvhive.evaluation.results import ResultsFolder
from kvhive.evaluation.settings import NONE, Settings, Unit, units_done
from kvhive.evaluation.workers import (
    Died,
    Failed,
    InProcess,
    ProcessPool,
    Worker,
    WorkerPool,
    threads_each,
)
from kvhive.spec import Knob

_JOBS = Knob("jobs", int, 1, least=1, most=1024)
MOST_DEATHS = 3  # of workers at one unit


@dataclass(frozen=True)
class State:
    """How far a run is. left: seconds still needed, None while nothing is known. note: a sentence
    for the user, once.
    """

    done: int
    total: int
    unit: str = ""
    elapsed: float = 0.0
    left: float | None = None
    note: str = ""


Progress = Callable[[State], None]


def evaluate(
    settings: Settings,
    out: Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
    loaded: Loaded | None = None,
) -> Path:
    """Run all recipes on all tasks and write every result to the folder `out`, which is returned.

    A folder with an unfinished run of the same settings is gone on with. jobs: processes; ray: the
    address of a Ray cluster, or "auto"; its workers are as many as `jobs`, or as there are CPUs.
    progress: called after each unit. loaded: a model and its tokenizer at hand, for `jobs=1`.
    Raises `ValueError`, `OSError` or `ImportError` with one sentence; what was written stays.
    """
    notify = progress or (lambda state: None)
    asked, settings = settings, settings.checked()
    pool = _pool(settings, jobs, ray, loaded)
    with _Dispatcher(pool) as dispatcher, ResultsFolder(Path(out)) as results:
        plan = dispatcher.plan()
        for note in (*asked.notes(), *pool.notes, *plan.notes):
            notify(State(0, len(plan.units), note=note))
        wanted = _begin(results, settings, plan)
        clock = _Clock(plan, wanted)
        notify(clock.state(""))
        for unit, rows, seconds in dispatcher.work(wanted):
            results.append(rows)
            notify(clock.finished(unit, seconds))
        results.finish(_order(plan, settings))
    return Path(out)


def _pool(settings: Settings, jobs: int, ray: str | None, loaded: Loaded | None) -> WorkerPool:
    _JOBS.check("evaluate", jobs)
    if settings.engine != TRANSFORMERS:
        if jobs > 1 or ray is not None or loaded is not None:
            raise ValueError(
                f"{settings.engine} loads the model itself and works on many items at once; leave "
                "--jobs, --ray and a model at hand out"
            )
        return EnginePool(settings)
    if ray is not None:
        from kvhive.evaluation.ray_workers import RayPool

        return RayPool(settings, ray, jobs)
    if jobs == 1:
        return InProcess(settings, loaded)
    if loaded is not None:
        raise ValueError(
            "a model at hand cannot be shared with other processes; name it, or jobs=1"
        )
    if settings.threads is None:
        settings = replace(settings, threads=threads_each(jobs))
    return ProcessPool(settings, jobs)


def _begin(results: ResultsFolder, settings: Settings, plan: Plan) -> list[Unit]:
    """Keep the rows of whole units from an earlier part of the run; the units still to do."""
    rows = results.begin(settings.identity(), plan.facts)
    done = units_done(rows, settings.recipes)
    keys = {unit: (unit.task, unit.mode, plan.names[unit]) for unit in plan.units}
    known = set(keys.values()) & done
    results.keep_only([row for row in rows if (row["task"], row["mode"], row["item"]) in known])
    return [unit for unit in plan.units if keys[unit] not in known]


def _order(plan: Plan, settings: Settings) -> Callable[[Row], tuple[int, int]]:
    places = {
        (unit.task, unit.mode, plan.names[unit]): place for place, unit in enumerate(plan.units)
    }
    recipes = {name: place for place, name in enumerate([*settings.recipes, NONE])}
    return lambda row: (places[row["task"], row["mode"], row["item"]], recipes[row["recipe"]])


class _Dispatcher:
    """Keeps every worker of a pool busy (as in `with`: stops them at the end)."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._idle: list[Worker] = []
        self._busy: dict[Worker, tuple[Unit | None, float]] = {}

    def __enter__(self) -> _Dispatcher:
        return self

    def __exit__(self, *what: object) -> None:
        for worker in (*self._idle, *self._busy):
            worker.stop()
        self._pool.close()

    def plan(self) -> Plan:
        """The plan, from the first worker that lives to send it. Raises `OSError` if none does."""
        for _ in range(MOST_DEATHS):
            self._give(None)
            reply = self._next()[1]
            if isinstance(reply, Plan):
                return reply
        raise OSError(
            f"{MOST_DEATHS} workers died one after another while they loaded the model (out of "
            "memory?)"
        )

    def work(self, units: list[Unit]) -> Any:
        """Yields (unit, rows, seconds) in the order of finishing.

        Raises a unit's own error, and `OSError` when workers keep dying at one.
        """
        waiting = deque(units)
        deaths: dict[Unit, int] = {}
        while waiting or self._busy:
            while waiting and len(self._busy) < self._pool.size:
                self._give(waiting.popleft())
            unit, reply, seconds = self._next()
            assert unit is not None
            if not isinstance(reply, Died):
                yield unit, reply, seconds
                continue
            deaths[unit] = deaths.get(unit, 0) + reply.at_work
            if deaths[unit] >= MOST_DEATHS:
                raise OSError(
                    f"{MOST_DEATHS} workers died one after another at {unit} (out of memory?); all "
                    "other rows are saved: use fewer jobs, and run the same command again"
                )
            waiting.appendleft(unit)

    def _give(self, unit: Unit | None) -> None:
        worker = self._idle.pop() if self._idle else self._pool.start()
        self._busy[worker] = unit, time.monotonic()
        worker.send(unit)

    def _next(self) -> tuple[Unit | None, Any, float]:
        worker, reply = self._pool.wait(list(self._busy))
        unit, since = self._busy.pop(worker)
        if isinstance(reply, Died):
            worker.stop()
        else:
            self._idle.append(worker)
        if isinstance(reply, Failed):
            raise reply.error
        return unit, reply, time.monotonic() - since


@dataclass
class _Clock:
    """Guesses the time left from the mean of each task's units so far."""

    plan: Plan
    wanted: list[Unit]
    spent: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def finished(self, unit: Unit, seconds: float) -> State:
        """Note a unit; where that leaves us."""
        self.spent.setdefault((unit.task, unit.mode), []).append(seconds)
        return self.state(str(unit))

    def state(self, unit: str) -> State:
        """Now."""
        worked = sum(map(len, self.spent.values()))
        done = len(self.plan.units) - len(self.wanted) + worked
        elapsed = time.monotonic() - self.begun
        return State(done, len(self.plan.units), unit, elapsed, self._left(elapsed))

    def _left(self, elapsed: float) -> float | None:
        total = sum(map(sum, self.spent.values()))
        count = sum(map(len, self.spent.values()))
        if not count:
            return None
        waiting: Mapping[tuple[str, str], int] = _count(self.wanted)
        needed = 0.0
        for key, units in waiting.items():
            spent = self.spent.get(key, [])
            each = sum(spent) / len(spent) if spent else total / count
            needed += each * (units - len(spent))
        return needed * elapsed / total if total else None  # workers side by side


def _count(units: list[Unit]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for unit in units:
        counts[unit.task, unit.mode] = counts.get((unit.task, unit.mode), 0) + 1
    return counts
