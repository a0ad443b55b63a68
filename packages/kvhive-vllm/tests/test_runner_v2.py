"""vLLM's second model runner, its programs interpreted: the tokens are those of `HiveCache`."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvhive_vllm.orders import Cut, Orders
from kvhive_vllm.runner_v2 import RunnerV2
from tests.interpreted import Job, run
from tests.models import Tiny, prompts

RECIPES = ("h2o@65", "snapkv@65", "streaming_llm@65", "keydiff@65")
TEXTS, NEW = prompts(150, 97), 12
CHUNKS = {"max_num_batched_tokens": 64}
JOBS = {
    **{recipe: Job(recipe, TEXTS, NEW, warm=recipe == "h2o@65") for recipe in RECIPES},
    "h2o@65, ahead": Job("h2o@65", TEXTS, NEW, asynchronous=True),
    "snapkv@65, ahead, chunks": Job("snapkv@65", TEXTS, NEW, asynchronous=True, options=CHUNKS),
    # Too few blocks for both: one is preempted before it loses a token, and starts anew.
    "window@120, ahead, short pool": Job(
        "window@120",
        prompts(90, 91),
        12,
        asynchronous=True,
        options={"num_gpu_blocks_override": 8, "max_model_len": 128},
    ),
}


def test_tokens_are_those_of_a_hive_cache(tiny: Tiny) -> None:
    """All engines in one process, which takes long to start."""
    outcomes = dict(zip(JOBS, run(tiny.folder, list(JOBS.values())), strict=True))
    for name, outcome in outcomes.items():
        job = JOBS[name]
        assert outcome.runner == "RunnerV2"
        assert outcome.scheduler == ("_Asynchronous" if job.asynchronous else "_Synchronous")
        assert (outcome.ahead >= job.new) == job.asynchronous, name
        assert (outcome.preempted > 0) == ("short pool" in name), name
        wanted = [tiny.expected(job.recipe, text, job.new) for text in job.texts]
        assert outcome.given == wanted, name
        assert outcome.free == outcome.total, name


class Engine:
    """What the mixin touches of a runner, and what it finds there when it is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.req_states = SimpleNamespace(req_id_to_index={"a": 5, "b": 2})
        self.block_tables = SimpleNamespace(append_block_ids=partial(self.note, "append"))
        self.compression = SimpleNamespace(
            follow=lambda output: self.note("follow") or output.kvhive,
            begin=partial(self.note, "begin"),
            end=partial(self.note, "end"),
        )

    def note(self, what: str, *args: Any, **kwargs: Any) -> None:
        said = ", ".join(map(str, [*args, *kwargs.items()]))
        self.calls.append(f"{what}({said})")

    def finish_requests(self, output: Any) -> None:
        self.note("finish")

    def update_requests(self, output: Any) -> None:
        self.note("update")

    def prepare_attn(self, batch: Any) -> Any:
        self.note("prepare")
        return batch.seq_lens.clone(), batch.seq_lens_cpu_upper_bound, batch.positions

    def execute_model(self, output: Any, batch: Any) -> Any:
        self.finish_requests(output)
        self.update_requests(output)
        return self.prepare_attn(batch)


class Runner(RunnerV2, Engine):
    compression: Any


def batch() -> tuple[Any, torch.Tensor]:
    """Of 2 requests with 1 and 3 new tokens, padded to 4 and 8; and the lengths graphs read."""
    held = torch.tensor([40, 23, 0, 0, 77], dtype=torch.int32)
    made = SimpleNamespace(
        req_ids=["b", "a"],
        num_scheduled_tokens=np.array([1, 3], dtype=np.int32),
        seq_lens=held[:4],
        seq_lens_cpu_upper_bound=held[:4].clone(),
        positions=torch.tensor([39, 20, 21, 22, 9, 9, 9, 9]),
    )
    return made, held


def test_a_step_is_physical_where_the_cache_is_looked_up_alone() -> None:
    runner, (made, held) = Runner(), batch()
    positions = made.positions.clone()
    orders = Orders(cuts={"b": Cut(8, 8, [4, 7])}, dropped={"b": 31})
    lengths, at_most, places = runner.execute_model(SimpleNamespace(kvhive=orders), made)
    assert runner.calls == [
        "follow()",
        "finish()",
        "append(2, ([4, 7],), ('overwrite', True))",
        "update()",
        "begin(['b', 'a'], [1, 3])",
        "prepare()",
        "end()",
    ]
    assert lengths.tolist() == at_most.tolist() == [9, 23, 0, 0]
    assert places.tolist() == [8, 20, 21, 22, 9, 9, 9, 9]
    assert held.tolist() == [9, 23, 0, 0, 77]  # in place, for graphs
    # Sampling and the next step go by what was read.
    assert made.seq_lens.tolist() == made.seq_lens_cpu_upper_bound.tolist() == [40, 23, 0, 0]
    assert torch.equal(made.positions, positions)


def test_where_nothing_is_dropped_nothing_is_shifted() -> None:
    runner, (made, _) = Runner(), batch()
    lengths, at_most, places = runner.execute_model(SimpleNamespace(kvhive=Orders()), made)
    assert lengths.tolist() == at_most.tolist() == [40, 23, 0, 0]
    assert places is made.positions
    assert "begin(['b', 'a'], [1, 3])" in runner.calls


def test_the_warm_up_of_the_engine_is_not_compressed() -> None:
    runner, (made, _) = Runner(), batch()
    runner.execute_model(SimpleNamespace(kvhive=Orders(dropped={"b": 3})), made)
    runner.calls.clear()
    made, _ = batch()
    lengths, _, _ = runner.execute_model(SimpleNamespace(), made)
    assert lengths.tolist() == [40, 23, 0, 0]
    assert runner.calls == ["finish()", "update()", "prepare()", "end()"]
