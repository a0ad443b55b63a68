"""Workers: in this process, or several processes of this machine. Ray's are in `ray_workers.py`.

A worker is sent one unit at a time and replies with its rows. One that dies is replaced and its
unit is given out again; nothing else is lost, because rows are written as they come.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, runtime_checkable

from kvhive.evaluation.evaluator import Evaluator, Loaded, Plan, Row
from kvhive.evaluation.settings import Settings, Unit
from kvhive.model.loading import be_quiet

Reply = Plan | list[Row]


@dataclass(frozen=True)
class Died:
    """A worker is gone, and with it what it was working on. at_work: whether it had begun."""

    at_work: bool = True


@dataclass(frozen=True)
class Failed:
    """A unit went wrong in a worker, which lives on. error: the exception, if it could be sent."""

    error: Exception


@runtime_checkable
class Worker(Protocol):
    """One worker. `None` as a unit asks for the plan."""

    def send(self, unit: Unit | None) -> None:
        """Begin; the reply comes through the pool's `wait`."""

    def stop(self) -> None:
        """End it."""


@runtime_checkable
class WorkerPool(Protocol):
    """A kind of workers. notes: sentences for the user."""

    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many may work side by side; may change while they do."""

    def start(self) -> Worker:
        """A new worker."""

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
        """The next that is done, and its reply."""

    def close(self) -> None:
        """After the last worker has been stopped."""


class InProcess:
    """The worker of a run without jobs: this process. It can only be waited for."""

    size = 1
    notes: tuple[str, ...] = ()

    def __init__(self, settings: Settings, loaded: Loaded | None = None) -> None:
        self._evaluator = Evaluator(settings, loaded)
        self._unit: Unit | None = None

    def start(self) -> InProcess:
        """Itself."""
        return self

    def send(self, unit: Unit | None) -> None:
        """Remember the unit."""
        self._unit = unit

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
        """Do the work now."""
        return self, self._evaluator.plan() if self._unit is None else self._evaluator.run(
            self._unit
        )

    def stop(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class ProcessPool:
    """`size` processes of this machine, each with a copy of the model."""

    notes: tuple[str, ...] = ()

    def __init__(self, settings: Settings, size: int) -> None:
        self.size = size
        self._settings = settings
        self._context = multiprocessing.get_context("spawn")

    def start(self) -> ProcessWorker:
        """A process that loads the model and waits for units."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._settings), daemon=True)
        process.start()
        theirs.close()
        return ProcessWorker(process, ours)

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
        """The first to reply, or to die."""
        ours = {worker.pipe: worker for worker in busy if isinstance(worker, ProcessWorker)}
        pipe: Any = wait(list(ours))[0]
        try:
            return ours[pipe], pipe.recv()
        except (EOFError, OSError):
            return ours[pipe], Died()

    def close(self) -> None:
        """Nothing: every process was stopped."""


@dataclass(eq=False)
class ProcessWorker:
    """A process and the pipe to it."""

    process: Any
    pipe: Connection

    def send(self, unit: Unit | None) -> None:
        """Send the unit; a process that is dead already is noticed by `wait`."""
        try:
            self.pipe.send(unit)
        except OSError:
            self.pipe.close()
            self.pipe, broken = multiprocessing.Pipe()
            broken.close()

    def stop(self) -> None:
        """End the process at once: it holds nothing that is not written."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def serve(pipe: Connection, settings: Settings) -> None:
    """The life of a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    be_quiet()
    evaluator: Evaluator | None = None
    with suppress(EOFError, OSError, KeyboardInterrupt):  # stopped, or nobody listens
        while True:
            unit = pipe.recv()
            try:
                evaluator = evaluator or Evaluator(settings)
                reply: Reply | Failed = evaluator.plan() if unit is None else evaluator.run(unit)
            except Exception as error:
                reply = Failed(sendable(error))
            pipe.send(reply)


def _end_with_parent() -> None:
    """A run that was killed leaves no process behind that works for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def sendable(error: Exception) -> Exception:
    """The error if it is of a plain kind, else one that holds its traceback as text."""
    if type(error) in (ValueError, TypeError, OSError, FileNotFoundError, ImportError, MemoryError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


def threads_each(workers: int) -> int:
    """CPU threads for each of several workers on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
