"""vLLM's second model runner, with physical lengths apart from logical ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvhive_vllm.compression import Compression
from kvhive_vllm.orders import Orders


class RunnerV2:
    """Mixed into `GPUModelRunner` or `CPUModelRunner` of the second generation.

    Its lengths are counted on the GPU and may be ahead of the CPU. What is dropped is taken off
    them there, by numbers that the scheduler worked out from lengths alone.
    """

    compression: Compression | None = None
    _orders: Orders | None = None  # of this step; none in the engine's own warm-up
    _logical: tuple[Any, Tensor, Tensor] | None = None  # a batch, and its lengths: real, at most

    def finish_requests(self: Any, scheduler_output: Any) -> None:
        """Evictions come before the engine takes up or clears any block."""
        self._orders = None
        if self.compression is not None and hasattr(scheduler_output, "kvhive"):
            self._orders = self.compression.follow(scheduler_output)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def update_requests(self: Any, scheduler_output: Any) -> None:
        """Cut block tables are in place before new blocks are put behind them."""
        if self._orders is not None:
            for name, order in self._orders.cuts.items():
                row = self.req_states.req_id_to_index[name]
                self.block_tables.append_block_ids(row, (order.blocks,), overwrite=True)
        super().update_requests(scheduler_output)  # type: ignore[misc]

    def prepare_attn(self: Any, input_batch: Any) -> Any:
        """Lengths and slots are physical, positions and all else logical."""
        orders = self._orders
        if orders is None:
            return super().prepare_attn(input_batch)  # type: ignore[misc]
        names, fresh = input_batch.req_ids, input_batch.num_scheduled_tokens
        self.compression.begin(names, fresh.tolist())
        if not orders.dropped:
            return super().prepare_attn(input_batch)  # type: ignore[misc]
        gone = torch.tensor([orders.dropped.get(name, 0) for name in names], dtype=torch.int32)
        self._shift(input_batch, gone)
        positions = input_batch.positions
        shift = gone.repeat_interleave(torch.from_numpy(fresh).long())
        input_batch.positions = _less(positions, shift)
        prepared = super().prepare_attn(input_batch)  # type: ignore[misc]
        input_batch.positions = positions
        return prepared

    def _shift(self: Any, batch: Any, gone: Tensor) -> None:
        """Graphs read the very tensor of lengths, so it is altered in place."""
        lengths, at_most = batch.seq_lens, batch.seq_lens_cpu_upper_bound
        self._logical = batch, lengths.clone(), at_most
        lengths.copy_(_less(lengths, gone))
        batch.seq_lens_cpu_upper_bound = _less(at_most, gone)

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        """When all layers have attended, requests take note; sampling goes by logical lengths."""
        given = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        if self._logical is not None:
            batch, batch.seq_lens, batch.seq_lens_cpu_upper_bound = self._logical
            self._logical = None
        if self.compression is not None:
            self.compression.end()
        return given


def _less(numbers: Tensor, by: Tensor) -> Tensor:
    """The first numbers less these; those behind them, which pad a batch, as they are."""
    less = numbers.clone()
    less[: len(by)] -= by.to(less.device)
    return less
