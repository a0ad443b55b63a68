"""kvhive's recipes inside stock vLLM: a scheduler, a worker and attention that reports. Nothing of
vLLM is patched, and without a recipe nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvhive_vllm import versions
from kvhive_vllm.recipes import SCHEDULER, WORKER, settings

__all__ = ["__version__", "engine_args"]
__version__ = "0.1.0"

versions.check()


def engine_args(recipe: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` and `AsyncEngineArgs` that run a recipe, as in
    `LLM("my-model", **engine_args("h2o@1024"))`.

    plugins: files or modules with policies of your own, which vLLM's processes load too. Raises
    `ValueError` for a recipe that cannot be run inside vLLM and for a plugin that fails,
    `FileNotFoundError` or `ImportError` for one that is not there, `TypeError` for no string.
    """
    return {
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKER,
        "additional_config": settings(recipe, plugins),
    }
