"""The same run on a Ray cluster of two nodes, and with workers and nodes lost in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from kvhive.evaluation import ray_workers
from kvhive.evaluation.ray_workers import RayPool, RayWorker
from kvhive.evaluation.results import ROWS, read_rows
from kvhive.evaluation.scheduler import State, evaluate
from kvhive.evaluation.settings import Settings
from kvhive.evaluation.tasks import TASKS
from kvhive.evaluation.workers import Died, Failed, Reply, Worker

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray and its libraries warn of much
ROWS_EACH = 3  # full, h2o@70 and the floor
# A raylet that was killed refuses connections: the head asks for it often, to notice that soon.
_WATCHFUL = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, each a raylet of its own with its own processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": _WATCHFUL}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def address(cluster: Cluster) -> str:
    """The cluster's, with both its nodes up, whatever a test before has lost."""
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    return str(cluster.address)


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings(
        model=str(folder),
        recipes=("h2o@70",),
        tasks=("passkey(lengths=(300,))",),
        limit=4,
        data="builtin",
        dtype="float32",
        threads=1,
    )


@pytest.fixture(scope="module")
def alone(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that one process writes."""
    return rows_file(evaluate(settings, tmp_path_factory.mktemp("alone")))


def rows_file(folder: Path) -> bytes:
    return (folder / ROWS).read_bytes()


@dataclass
class Watch:
    """What a run's workers did: the nodes that answered units, how many workers died, and of these
    how many for want of a place.
    """

    nodes: list[str] = field(default_factory=list)
    died: int = 0
    unplaced: int = 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RayWorker], None]], Watch]:
    """`watch(before)`: `before(worker)` is called while the worker is at a unit; see `Watch`."""
    seen = Watch()
    wait = RayPool.wait

    def watching(before: Callable[[RayWorker], None] = lambda worker: None) -> Watch:
        def noted(pool: RayPool, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
            for worker in busy:
                assert isinstance(worker, RayWorker)
                before(worker)
            worker, reply = wait(pool, busy)
            assert isinstance(worker, RayWorker)
            if isinstance(reply, Died):
                seen.died += 1
                seen.unplaced += not reply.at_work
            else:
                seen.nodes.append(worker.here()[0])
            return worker, reply

        monkeypatch.setattr(RayPool, "wait", noted)
        return seen

    return watching


def test_both_nodes_work_and_the_file_is_the_same(address, settings, alone, tmp_path, watch):
    got: list[State] = []
    seen = watch()
    out = evaluate(settings, tmp_path, ray=address, jobs=5, progress=got.append)
    assert rows_file(out) == alone
    assert len(set(seen.nodes)) == 2
    assert not ray.is_initialized()
    assert any(state.note == "the Ray cluster has room for 2 of 5 workers" for state in got)


def test_killed_workers_lose_nothing(address, settings, alone, tmp_path, watch):
    """One is shot over the plan, another in the middle of its second or third unit."""
    killed: list[int] = []

    def kill_two(worker: RayWorker) -> None:
        if len(killed) == 0 or (len(killed) == 1 and len(read_rows(tmp_path)) >= 2 * ROWS_EACH):
            killed.append(worker.here()[1])
            os.kill(killed[-1], signal.SIGKILL)

    seen = watch(kill_two)
    out = evaluate(settings, tmp_path, ray=address)
    assert len(killed) == seen.died == 2
    assert rows_file(out) == alone


def test_a_lost_node_loses_nothing(cluster, address, settings, alone, tmp_path, watch):
    (second,) = cluster.worker_nodes
    lost: list[str] = []

    def lose_its_node(worker: RayWorker) -> None:
        at_work = not lost and len(read_rows(tmp_path)) >= 2 * ROWS_EACH
        node, process = worker.here() if at_work else ("", 0)
        if node == second.node_id:
            lost.append(node)
            cluster.remove_node(second, allow_graceful=False)
            with contextlib.suppress(ProcessLookupError):  # a machine takes all with it
                os.kill(process, signal.SIGKILL)

    seen = watch(lose_its_node)
    out = evaluate(settings, tmp_path, ray=address)
    assert lost
    assert seen.died >= 1
    assert seen.nodes[-1] not in lost
    assert rows_file(out) == alone


def test_places_that_others_hold_are_not_waited_for(
    address, settings, alone, tmp_path, watch, monkeypatch
):
    monkeypatch.setattr(ray_workers, "POLL", 0.2)
    monkeypatch.setattr(ray_workers, "PATIENCE", 0.5)
    ray.init(address=address, log_to_driver=False)
    try:
        holder = ray.remote(num_cpus=1)(_Holder).remote()
        ray.get(holder.hold.remote())
        seen = watch()
        out = evaluate(settings, tmp_path, ray=address)
        assert ray.is_initialized()  # it was not this run that joined the cluster
        with pytest.raises(ValueError, match="this process works with the Ray cluster"):
            evaluate(settings, tmp_path, ray="elsewhere:1")
        second = ray.remote(num_cpus=1)(_Holder).remote()
        ray.get(second.hold.remote())
        monkeypatch.setattr(ray_workers, "START", 0.5)
        with pytest.raises(OSError, match=r"no node of the Ray cluster had 1 CPU free"):
            evaluate(settings, tmp_path / "none", ray=address)
    finally:
        ray.shutdown()
    assert seen.unplaced == 1
    assert len(set(seen.nodes)) == 1
    assert rows_file(out) == alone


_DEADLY = """
import os
from dataclasses import dataclass
from kvhive.evaluation.tasks import TASKS
from kvhive.evaluation.tasks.passkey import Passkey

@TASKS.register("deadly")
@dataclass(frozen=True)
class Deadly(Passkey):
    def run(self, tested, item, mode):
        if item.id == "passkey-1":
            os._exit(1)
        return super().run(tested, item, mode)
"""


def test_a_unit_that_kills_every_worker_ends_the_run_with_a_sentence(
    address, settings, tmp_path, watch, monkeypatch
):
    """The task comes from a file, named by a relative path: actors work in another folder."""
    monkeypatch.setattr(TASKS, "_classes", dict(TASKS._classes))
    monkeypatch.setattr(RayPool, "size", 1)  # one after another: item 0 is done first
    monkeypatch.chdir(tmp_path)
    Path("deadly.py").write_text(_DEADLY)
    deadly = replace(
        settings,
        tasks=("deadly(lengths=(300,))",),
        modes=("agnostic",),
        limit=2,
        plugins=("deadly.py",),
    )
    seen = watch()
    with pytest.raises(OSError, match=r"3 workers died one after another at deadly.*, item 1"):
        evaluate(deadly, tmp_path / "run", ray=address)
    assert seen.died == 3
    assert {row["item"] for row in read_rows(tmp_path / "run")} == {"passkey-0"}


class _Holder:
    """Somebody else's job."""

    def hold(self) -> None:
        """The place is held as soon as this has been answered."""


def test_too_small_nodes_are_told(address, settings, tmp_path):
    with pytest.raises(OSError, match=r"no node of the Ray cluster at .* has 2 CPUs for a worker"):
        evaluate(replace(settings, threads=2), tmp_path, ray=address)
    assert not ray.is_initialized()


def _closed() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:{closed}", "Connection refused"),
        ("127.0.0.1:{other}", "nothing answers as a Ray cluster does"),
        ("127.0.0.1:99999", "expected 'auto' or host:port"),
        ("ray://127.0.0.1", "expected 'auto' or host:port"),
        ("auto", "nothing answers as a Ray cluster does"),
    ],
)
def test_no_cluster_is_told(settings, tmp_path, monkeypatch, address, reason):
    monkeypatch.setattr(ray_workers, "ANSWER", 2.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{_closed()}")  # what "auto" goes by
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        address = address.format(closed=_closed(), other=other.getsockname()[1])
        with pytest.raises(OSError, match=rf"no Ray cluster at '{address}': .*{reason}"):
            evaluate(settings, tmp_path / "run", ray=address)
    assert not (tmp_path / "run").exists()
