"""Workers on a Ray cluster: the same units, spread over machines. Needs the extra `kvhive[ray]`.

A worker is an actor. Ray says when its process or its node is lost; the scheduler then starts
another, which Ray places on a node that is left. A cluster that holds fewer actors than were asked
for, from the start or since a node went, is used with as many as it holds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from kvhive.evaluation.data.source import VARIABLE
from kvhive.evaluation.evaluator import Evaluator
from kvhive.evaluation.settings import Settings, Unit
from kvhive.evaluation.workers import Died, Failed, Reply, Worker, sendable
from kvhive.files import expanded
from kvhive.plugins import anywhere

POLL = 5.0  # seconds between looks at workers that wait for a place
PATIENCE = 60.0  # seconds a worker may wait for a place while others work
START = 600.0  # seconds until one worker must have a place
ANSWER = 60.0  # seconds a cluster may take to say that it is there


class RayPool:
    """`jobs` actors with a model each, or one for every `threads` CPUs of the cluster (jobs=1).

    address: "auto" for the cluster this machine belongs to, or "host:port". Every node needs
    kvhive, the model, plugins and the data under the same names. Raises `ImportError` without ray,
    `OSError` when there is no cluster at the address or none of its nodes can hold an actor.
    """

    def __init__(self, settings: Settings, address: str, jobs: int) -> None:
        self._ray, self._ours = _connect(address)
        self._cpus = settings.threads or 1
        self._gpus = 1 if settings.device.startswith("cuda") else 0
        self._settings = _anywhere(replace(settings, threads=self._cpus))
        self._most = jobs if jobs > 1 else sys.maxsize
        self._workers: list[RayWorker] = []
        self._actor = self._ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0
        )(_Actor)
        room = self._room()
        self.notes: tuple[str, ...] = ()
        if room == 0:
            self.close()
            raise OSError(
                f"no node of the Ray cluster at {address!r} has {self._needs()} for a worker: "
                "start nodes that have, or give fewer --threads"
            )
        if jobs > 1 and room < jobs:
            self.notes = (f"the Ray cluster has room for {room} of {jobs} workers",)

    @property
    def size(self) -> int:
        """As many as were asked for and the nodes that are there now can hold."""
        return max(1, min(self._most, self._room()))

    def start(self) -> RayWorker:
        """An actor somewhere in the cluster."""
        worker = RayWorker(self._ray, self._actor.remote(self._settings))
        self._workers = [one for one in self._workers if not one.stopped] + [worker]
        return worker

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
        """The first to reply, to die with its process or node, or to wait too long for a place.

        Raises `OSError` when no worker at all finds a place.
        """
        ours = {worker.future: worker for worker in busy if isinstance(worker, RayWorker)}
        while True:
            done, _ = self._ray.wait(list(ours), num_returns=1, timeout=POLL)
            if done:
                return ours[done[0]], self._reply(done[0])
            if late := self._late(ours.values()):
                return late, Died(at_work=False)

    def close(self) -> None:
        """Leave the cluster, if this pool joined it."""
        if self._ours:
            self._ray.shutdown()

    def _reply(self, future: Any) -> Reply | Failed | Died:
        """What came of a unit. The actor's own errors are replies; all others are Ray's."""
        errors = self._ray.exceptions
        try:
            reply: Reply | Failed = self._ray.get(future)
            return reply
        except errors.RayTaskError as error:
            return Failed(_not_ready(error))
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                return Failed(_not_ready(error))
            return Died()

    def _late(self, busy: Collection[RayWorker]) -> RayWorker | None:
        """A worker whose unit another one should do, because all places are taken."""
        waiting = [worker for worker in busy if not worker.placed]
        started = [worker for worker in self._workers if not worker.stopped]
        if not waiting:
            return None
        first = min(waiting, key=lambda worker: worker.since)
        waited = time.monotonic() - first.since
        if len(waiting) < len(started) and waited > PATIENCE:
            self._most = len(started) - 1
            return first
        if len(waiting) == len(started) and waited > START:
            raise OSError(
                f"no node of the Ray cluster had {self._needs()} free for {START / 60:.0f} "
                "minutes; run the same command again when there is room: it goes on where it was"
            )
        return None

    def _room(self) -> int:
        """How many actors the nodes that are alive can hold, one by one."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = 0
        for has in nodes:
            cpus = int(has.get("CPU", 0)) // self._cpus
            room += min(cpus, int(has.get("GPU", 0))) if self._gpus else cpus
        return room

    def _needs(self) -> str:
        cpus = f"{self._cpus} CPU{'s' if self._cpus > 1 else ''}"
        return f"{cpus} and a GPU" if self._gpus else cpus


class RayWorker:
    """An actor, and the reply awaited from it."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._here = actor.here.remote()
        self.since = time.monotonic()
        self.stopped = False
        self.future: Any = None

    @property
    def placed(self) -> bool:
        """Whether the actor runs (or has died): it no longer waits for a node."""
        return bool(self._ray.wait([self._here], timeout=0)[0])

    def here(self) -> tuple[str, int]:
        """The node the actor runs on and its process there; waits until it runs."""
        node, process = self._ray.get(self._here)
        return node, process

    def send(self, unit: Unit | None) -> None:
        """Begin a unit."""
        self.future = self._actor.reply.remote(unit)

    def stop(self) -> None:
        """Give the actor's place back; one that is lost has none."""
        self.stopped = True
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)


class _Actor:
    """What an actor does."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._evaluator: Evaluator | None = None

    def here(self) -> tuple[str, int]:
        """The id of the node, and the process."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def reply(self, unit: Unit | None) -> Reply | Failed:
        """A unit's rows, or the plan. Errors are replies too, so that the actor lives on."""
        try:
            self._evaluator = self._evaluator or Evaluator(self._settings)
            return self._evaluator.plan() if unit is None else self._evaluator.run(unit)
        except Exception as error:
            return Failed(sendable(error))


def _anywhere(settings: Settings) -> Settings:
    """With absolute paths: actors work in another folder than the command was given in."""

    def absolute(name: str) -> str:
        path = expanded(name)
        return str(path.resolve()) if path.exists() else name

    data = settings.data or os.environ.get(VARIABLE)
    if data and data not in ("hub", "builtin"):
        data = absolute(data)
    model = settings.model if settings.model == "smollm2" else absolute(settings.model)
    return replace(settings, model=model, data=data, plugins=anywhere(settings.plugins))


def _not_ready(error: Exception) -> OSError:
    """For an actor that cannot begin. Ray's report ends with the actor's own error."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return OSError(
        f"a worker on the Ray cluster cannot work: {reason}; every node needs kvhive, and all that "
        "it needs, in the same versions as here"
    )


def _connect(address: str) -> tuple[Any, bool]:
    """The module ray, in touch with the cluster, and whether this call did that."""
    try:
        import ray
    except ImportError:
        raise ImportError("--ray needs the package ray: pip install 'kvhive[ray]'") from None
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here):
            raise ValueError(f"this process works with the Ray cluster {here!r}, not {address!r}")
        return ray, False
    try:
        _check_alive(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"no Ray cluster at {address!r}: {reason}; start one with `ray start --head`, and give "
            "the address that it prints, or 'auto' on one of its machines"
        ) from error
    return ray, True


def _check_alive(address: str) -> None:
    """Raises `OSError` if no Ray cluster answers at "host:port" or, for "auto", at all.

    Ray's own tool asks, in a process of its own: where no cluster is, `ray.init` tries for minutes
    and may end the process.
    """
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("expected 'auto' or host:port")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            ask += ["--address", address]
    try:
        subprocess.run(ask, check=True, capture_output=True, timeout=ANSWER)
    except subprocess.SubprocessError:
        raise OSError("nothing answers as a Ray cluster does") from None
