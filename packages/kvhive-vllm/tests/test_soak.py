"""Thousands of random requests: no block is lost, nothing grows, nobody is forgotten.

The number of requests comes from KVHIVE_SOAK (default 200, a few seconds).
"""

from __future__ import annotations

import os
import random
from typing import Any

import psutil
import pytest
from vllm import SamplingParams

from tests.models import VOCABULARY, Tiny, free_blocks, scheduler_of

REQUESTS = int(os.environ.get("KVHIVE_SOAK", "200"))
MOST_GROWTH = 64 * 2**20  # bytes that a process may come to hold after half of the requests


@pytest.mark.parametrize("recipe", ["h2o@70", "streaming_llm@70", "snapkv@70"])
@pytest.mark.parametrize("prefixes", [False, True])
def test_random_requests_leave_nothing_behind(tiny: Tiny, recipe: str, prefixes: bool) -> None:
    """Prompts of any length, shared beginnings, samples, aborts and preemptions in a short pool.

    (No seeds: with chunks of prompts vLLM itself fails on them on a CPU.)
    """
    draw = random.Random(recipe)
    options: dict[str, Any] = {
        "num_gpu_blocks_override": 24,
        "max_model_len": 384,
        "max_num_batched_tokens": 160,
        "max_num_seqs": 10,
        "enable_prefix_caching": prefixes,
        "disable_log_stats": False,
    }
    heads = [[draw.randrange(1, VOCABULARY) for _ in range(200)] for _ in range(3)]
    with tiny.engine(recipe, **options) as llm:
        ended = _drive(llm, draw, heads)
        free, total = free_blocks(llm)
        scheduler, runner = scheduler_of(llm), _runner(llm)
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert scheduler.manager.tokens_dropped > 0
        assert scheduler.manager.lengths == {}
        assert not runner.compression.requests.keys() - set(scheduler.finished_req_ids)
    assert ended == REQUESTS
    assert free == total
    assert preempted > 0


def _drive(llm: Any, draw: random.Random, heads: list[list[int]]) -> int:
    """Feed the engine until all requests have ended, one way or the other; how many did."""
    engine, process = llm.llm_engine, psutil.Process()
    sent, alive, ended, memory = 0, set[str](), 0, 0
    while sent < REQUESTS or alive:
        while sent < REQUESTS and len(alive) < 12:
            engine.add_request(str(sent), _prompt(draw, heads), _params(draw))
            alive.add(str(sent))
            sent += 1
        gone = {one.request_id for one in engine.step() if one.finished}
        if alive and draw.random() < 0.05:
            name = draw.choice(sorted(alive))
            if name not in gone:
                engine.abort_request([name])
                gone.add(name)
        ended += len(gone & alive)
        alive -= gone
        if not memory and ended > REQUESTS // 2:
            memory = process.memory_info().rss
    engine.step()
    assert process.memory_info().rss - memory < MOST_GROWTH
    return ended


def _prompt(draw: random.Random, heads: list[list[int]]) -> dict[str, list[int]]:
    own = [draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(1, 140))]
    shared = draw.choice(heads)[: draw.randrange(201)] if draw.random() < 0.5 else []
    return {"prompt_token_ids": shared + own}


def _params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice([0.0, 1.0]),
        max_tokens=draw.randrange(1, 44),
        ignore_eos=True,
        detokenize=False,
    )


def _runner(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner
