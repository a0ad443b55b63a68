"""The scheduler: decides how many tokens stay, gives their blocks back and tells the workers."""

from __future__ import annotations

import time
from typing import Any

from kvhive.lengths import Lengths
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from kvhive_vllm.counters import Counted
from kvhive_vllm.manager import HiveManager
from kvhive_vllm.orders import Orders
from kvhive_vllm.refusals import checked_recipe

logger = init_logger(f"vllm.{__name__}")


class _Evicting(Scheduler):
    """Over vLLM's own schedulers: evictions come before what it schedules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = checked_recipe(self.vllm_config)
        self.manager = _only_manager(self)
        self._told = (0, 0)  # tokens dropped and blocks freed, when statistics were last made

    def add_request(self, request: Request) -> None:
        """As vLLM's; a request whose prompt goes on later is aborted at once, with a word in the
        log.
        """
        if request.resumable:
            logger.error(
                "kvhive: request %s is aborted: a prompt that streams in cannot go on behind "
                "tokens that were dropped; send it whole",
                request.request_id,
            )
            request.abort_immediately = True
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's, with `kvhive` of the output saying what the workers are to do."""
        orders = Orders()
        for request in list(self.running):
            if request.num_computed_tokens and not request.is_prefill_chunk:
                self._evict(request, orders)
        output = super().schedule(*args, **kwargs)
        lengths = self.manager.lengths
        for name in [name for name in orders.cuts if name not in lengths]:
            del orders.cuts[name]  # preempted in this very step
        for name in output.num_scheduled_tokens:
            request = self.requests[name]
            orders.seen[name] = request.num_computed_tokens
            if name in lengths:
                orders.decoding.add(name)
                if gone := lengths[name].dropped:
                    orders.dropped[name] = gone
            elif not request.is_prefill_chunk:
                orders.ending.add(name)
        output.kvhive = orders
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with what was counted since the last time. One server alone gets it."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._count().put_into(stats)
        return stats

    def _evict(self, request: Request, orders: Orders) -> None:
        """What a request must give up after its last step."""
        name, manager = request.request_id, self.manager
        lengths = manager.lengths.get(name)
        if lengths is None:
            lengths = manager.lengths[name] = Lengths(self.recipe)
        before = lengths.dropped
        event = lengths.step(request.num_computed_tokens)
        if event is None:
            return
        cut = manager.shrink(name, event, lengths.dropped - before)
        if cut is not None:
            orders.cuts[name] = cut
            return
        # All of it is shared and the pool is empty: nothing can move before others are done.
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())

    def _count(self) -> Counted:
        manager, (dropped, freed) = self.manager, self._told
        self._told = manager.tokens_dropped, manager.blocks_freed
        held = manager.req_to_blocks
        return Counted(
            manager.tokens_dropped - dropped,
            manager.blocks_freed - freed,
            sum(len(blocks) for blocks in held.values()),
            len(held),
        )


def _only_manager(scheduler: Scheduler) -> HiveManager:
    """Raises `ValueError` for a model whose layers differ in how they attend."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if len(managers) != 1 or not isinstance(managers[0], HiveManager):
        kinds = ", ".join(type(manager).__name__ for manager in managers)
        raise ValueError(
            "kvhive-vllm serves models whose layers all attend to everything, and this one asks "
            f"for {kinds}"
        )
    return managers[0]


class _Synchronous(_Evicting):
    pass


class _Asynchronous(_Evicting, AsyncScheduler):
    pass


class HiveScheduler:
    """Stands for the synchronous or the asynchronous one, as vLLM's configuration says."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Evicting:
        """The one that is asked for, with vLLM's own arguments."""
        config = kwargs["vllm_config"].scheduler_config
        return (_Asynchronous if config.async_scheduling else _Synchronous)(*args, **kwargs)
