"""Workers on a Ray cluster: the same units, spread over machines. Needs the extra `kvhive[ray]`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvhive.evaluation.crew import Answer, Died, Failed, Worker, sendable
from kvhive.evaluation.lab import Lab
from kvhive.evaluation.settings import Settings, Unit


class RayCrew:
    """`size` actors with a model each, or one for every CPU of the cluster (size 1 or less asks
    so).

    address: "auto" for the cluster this machine belongs to, or "host:port". Every node needs
    kvhive, the model and the data under the same names. Raises `ImportError` without ray, `OSError`
    when there is no cluster at the address.
    """

    def __init__(self, settings: Settings, address: str, size: int) -> None:
        self._ray = _connect(address)
        threads = settings.threads or 1
        self._settings = replace(settings, threads=threads)
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        self.size = size if size > 1 else max(1, cpus // threads)
        gpus = 1 if settings.device.startswith("cuda") else 0
        self._actor = self._ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_Bench)

    def hire(self) -> RayWorker:
        """An actor somewhere in the cluster."""
        return RayWorker(self._ray, self._actor.remote(self._settings))

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Answer | Failed | Died]:
        """The first to answer, or to die with its process or node."""
        ours = {worker.future: worker for worker in busy if isinstance(worker, RayWorker)}
        (future,), _ = self._ray.wait(list(ours), num_returns=1)
        try:
            return ours[future], self._ray.get(future)
        except self._ray.exceptions.RayActorError:
            return ours[future], Died()


class RayWorker:
    """An actor, and the answer awaited from it."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.future: Any = None

    def send(self, unit: Unit | None) -> None:
        """Begin a unit."""
        self.future = self._actor.answer.remote(unit)

    def stop(self) -> None:
        """Give the actor's place back."""
        self._ray.kill(self._actor)


class _Bench:
    """What an actor does."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lab: Lab | None = None

    def answer(self, unit: Unit | None) -> Answer | Failed:
        """A unit's rows, or the plan. Errors are answers too, so that the actor lives on."""
        try:
            self._lab = self._lab or Lab(self._settings)
            return self._lab.plan() if unit is None else self._lab.run(unit)
        except Exception as error:
            return Failed(sendable(error))


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("--ray needs the package ray: pip install 'kvhive[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"no Ray cluster at {address!r}: {reason}") from error
    return ray
