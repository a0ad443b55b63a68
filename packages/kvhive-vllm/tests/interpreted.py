"""Engines on vLLM's second model runner, whose programs Triton's interpreter runs on the CPU.

In a process of their own, since vLLM looks for Triton once, when it is imported. It takes Triton on
a CPU if that names a backend for CPUs, which the stock one lacks and its interpreter does not need;
here one is named. Nothing of vLLM is altered.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@dataclass(frozen=True)
class Job:
    """An engine and what it is asked. attention: None for the CPU's own. warm: vLLM's own warm-up
    of the runner goes first.
    """

    recipe: str
    texts: Sequence[Sequence[int]]
    new: int
    asynchronous: bool = False
    attention: str | None = None
    warm: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """given: the new tokens of each prompt. free: blocks at the end, of total. runner, scheduler,
    pages: names of classes. ahead: steps scheduled before the last one's tokens were known.
    preempted: times that a request was.
    """

    given: list[list[int]]
    free: int
    total: int
    runner: str
    scheduler: str
    pages: str
    ahead: int
    preempted: int


def run(folder: Path, jobs: Sequence[Job]) -> list[Outcome]:
    """One after the other, with the model of a folder. Skips the test where Triton is missing."""
    pytest.importorskip("triton", reason="Triton, whose interpreter runs all this, is missing")
    said = subprocess.run(
        [sys.executable, "-m", "tests.interpreted", str(folder)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-4000:]
    return [Outcome(**one) for one in json.loads(said.stdout.splitlines()[-1])]


def _run(folder: str, job: Job) -> Outcome:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.engine.llm_engine import LLMEngine

    import kvhive_vllm
    from kvhive_vllm import backends

    place = AttentionBackendEnum.CPU_ATTN  # the only one that vLLM asks for on a CPU
    chosen = AttentionBackendEnum[job.attention] if job.attention else place
    own, backends.OURS[place] = backends.OURS[place], backends.OURS[chosen]
    defaults: dict[str, Any] = {
        "model": folder,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": 32,
        "num_gpu_blocks_override": 64,
        "kv_cache_memory_bytes": 2**28,
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 1024,
        "seed": 0,
    }
    args = EngineArgs(**defaults | kvhive_vllm.engine_args(job.recipe) | job.options)
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = job.asynchronous  # CPUs are given False
    engine = LLMEngine.from_vllm_config(config)
    backends.OURS[place] = own
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    if job.warm:
        _warm(worker)
    before = _preemptions(engine)
    params = SamplingParams(temperature=0, max_tokens=job.new, ignore_eos=True, detokenize=False)
    for name, text in enumerate(job.texts):
        engine.add_request(str(name), {"prompt_token_ids": list(text)}, params)
    given: dict[int, list[int]] = {}
    ahead = 0
    while engine.has_unfinished_requests():
        for one in engine.step():
            if one.finished:
                given[int(one.request_id)] = list(one.outputs[0].token_ids)
        ahead += len(core.batch_queue or ())
    pool = core.scheduler.kv_cache_manager.block_pool
    outcome = Outcome(
        [given[name] for name in sorted(given)],
        pool.get_num_free_blocks(),
        pool.num_gpu_blocks - 1,
        type(worker.model_runner).__mro__[1].__name__,
        type(core.scheduler).__name__,
        type(worker.model_runner.compression.groups[0].pages[0]).__name__,
        ahead,
        _preemptions(engine) - before,
    )
    engine.engine_core.shutdown()
    return outcome


def _preemptions(engine: Any) -> int:
    """Of all engines so far."""
    metrics = engine.get_metrics()
    return sum(int(one.value) for one in metrics if one.name == "vllm:num_preemptions")


def _warm(worker: Any) -> None:
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    model, sample = worker.execute_model, worker.sample_tokens
    assert run_mixed_prefill_decode_warmup(worker.model_runner, model, sample, 40)


def main() -> None:
    """Jobs from the standard input; outcomes on the last line of the standard output."""
    import torch
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # the size of a writer's tiles
    outcomes = []
    for one in json.load(sys.stdin):
        gc.freeze()  # engines collect often, and what has been imported takes long to look at
        outcomes.append(_run(sys.argv[1], Job(**one)))
    print(json.dumps([asdict(one) for one in outcomes]))


if __name__ == "__main__":
    main()
