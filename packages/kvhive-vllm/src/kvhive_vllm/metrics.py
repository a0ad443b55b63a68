"""What `/metrics` gains: a plug-in of vLLM's statistics (group `vllm.stat_logger_plugins`).

It is loaded with every server where this package is installed, and does nothing without a recipe.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from kvhive_vllm.counters import Counted
from kvhive_vllm.refusals import recipe_of

logger = init_logger(f"vllm.{__name__}")


class HiveStatLogger(StatLoggerBase):
    """Tokens dropped, blocks freed and blocks that a request holds, of one engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._dropped = self._freed = self._shown = 0
        if recipe_of(vllm_config) is not None:
            self._metrics = [metric.labels(engine=str(engine_index)) for metric in _metrics()]

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Called after every step of the engine, in the server's process, before vLLM's own."""
        counted = None if scheduler_stats is None else Counted.taken_from(scheduler_stats)
        if counted is None:
            return
        self._dropped += counted.dropped
        self._freed += counted.freed
        dropped, freed, blocks = self._metrics
        dropped.inc(counted.dropped)
        freed.inc(counted.freed)
        blocks.set(counted.blocks / counted.requests if counted.requests else 0.0)

    def log_engine_initialized(self) -> None:
        """The workers have said what is on."""

    def log(self) -> None:
        """One line, as often as vLLM writes its own, where something went."""
        if self._dropped != self._shown:
            logger.info(
                "kvhive: %d tokens dropped, %d blocks freed since the start",
                self._dropped,
                self._freed,
            )
            self._shown = self._dropped


def _metrics() -> tuple[Any, Any, Any]:
    """Of this process, made once."""
    return (
        _metric(Counter, "kvhive_tokens_dropped", "Tokens that left the KV cache by a recipe"),
        _metric(Counter, "kvhive_blocks_freed", "Blocks of the KV cache that they gave back"),
        _metric(Gauge, "kvhive_blocks_per_request", "Blocks held by a running request, mean"),
    )


def _metric(kind: type[Any], name: str, text: str) -> Any:
    known = REGISTRY._names_to_collectors.get(name)
    options = {"multiprocess_mode": "mostrecent"} if kind is Gauge else {}
    return known or kind(name, text, ["engine"], **options)
