"""kvhive's recipes inside stock vLLM: a scheduler, a worker and attention that reports. Nothing of
vLLM is patched, and without a recipe nothing of this runs.
"""

from __future__ import annotations

from typing import Any

from kvhive_vllm import versions
from kvhive_vllm.recipes import KEY, SCHEDULER, WORKER, read

__all__ = ["__version__", "engine_args"]
__version__ = "0.1.0"

versions.check()


def engine_args(recipe: str) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` and `AsyncEngineArgs` that run a recipe, as in
    `LLM("my-model", **engine_args("h2o@1024"))`.

    Raises `ValueError` for a recipe that cannot be run inside vLLM, `TypeError` for no string.
    """
    return {
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKER,
        "additional_config": {KEY: {"recipe": str(read(recipe))}},
    }
