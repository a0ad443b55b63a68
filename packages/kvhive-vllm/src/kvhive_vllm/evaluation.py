"""vLLM for `kvhive evaluate --engine vllm`: answers to many prompts, by one engine a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kvhive.evaluation.engine import Engine, Job, Question
from kvhive.recipe import Recipe

from kvhive_vllm import engine_args, recipes, versions

FULL = Recipe.parse("full")
# Unless set: no reports among the progress, and on CPUs a pool (GiB) that leaves room for others.
SETTINGS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}

# A process picks its attention once, and the engines of a run pick differently.
OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class VllmKind:
    """How the evaluator finds vLLM and starts it: the entry point `vllm` of `kvhive.engines`."""

    def __init__(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ[OWN_PROCESS] = "1"

    @property
    def version(self) -> str:
        """vLLM's, and that of its build."""
        found = versions.installed()
        assert found is not None  # or this package could not have been imported
        return found[1]

    @property
    def device(self) -> str:
        """What vLLM was built for and finds: "cpu", "cuda"."""
        from vllm.platforms import current_platform

        return str(current_platform.device_type)

    def check(self, recipe: Recipe) -> None:
        """Raises `ValueError` for a recipe that vLLM cannot run."""
        recipes.read(recipe)

    def start(self, job: Job) -> Engine:
        """An engine of the recipe; of the full cache: vLLM as it comes."""
        return VllmEngine(job)


class VllmEngine:
    """One `vllm.LLM`."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        ours = {} if job.recipe == FULL else engine_args(str(job.recipe), job.plugins)
        self._ends = sorted(job.ends)
        self._llm = LLM(
            model=job.model,
            dtype=job.dtype,
            max_model_len=job.tokens,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            use_tqdm_on_load=False,
            seed=0,
            **ours,
        )

    def write(self, questions: Sequence[Question]) -> list[list[int]]:
        """Greedy answers, token by token as many at once as vLLM sees fit."""
        prompts: Any = [{"prompt_token_ids": list(one.prompt)} for one in questions]
        params = [self._params(one.limit) for one in questions]
        given = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in given]

    def close(self) -> None:
        """End its processes, and give the memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _params(self, limit: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=limit,
            ignore_eos=True,  # the job's ends alone count
            stop_token_ids=self._ends,
            detokenize=False,
        )
