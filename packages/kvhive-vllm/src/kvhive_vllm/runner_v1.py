"""vLLM's first model runner, with physical lengths apart from logical ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvhive_vllm.compression import Compression


class RunnerV1:
    """Mixed into `GPUModelRunner` or `CPUModelRunner` of the first generation."""

    compression: Compression | None = None
    _dropped: dict[str, int] = {}  # noqa: RUF012  (replaced with every step)

    def _update_states(self: Any, scheduler_output: Any) -> Any:
        """Evictions come before the engine takes up or clears any block."""
        if self.compression is not None:
            orders = self.compression.follow(scheduler_output)
            self._dropped = orders.dropped
            for name, order in orders.cuts.items():
                self.requests[name].block_ids[0][:] = order.blocks
                row = self.input_batch.req_id_to_index.get(name)
                if row is not None:
                    self.input_batch.block_table.add_row((order.blocks,), row)
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """Lengths and slots are physical, positions and all else logical."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        if self.compression is None:
            return prepared
        names = list(self.input_batch.req_ids)
        self.compression.begin(names, num_scheduled_tokens.tolist())
        if self._dropped:
            self._shift(names, num_scheduled_tokens)
        return prepared

    def _shift(self: Any, names: list[str], fresh: np.ndarray) -> None:
        count, total = len(names), int(fresh.sum())
        gone = torch.tensor([self._dropped.get(name, 0) for name in names])
        by = gone.to(self.seq_lens.dtype)
        self.seq_lens[:count] -= by.to(self.seq_lens.device)
        self.optimistic_seq_lens_cpu[:count] -= by
        shift = gone.repeat_interleave(torch.from_numpy(fresh).long())
        self.input_batch.block_table.compute_slot_mapping(
            count,
            self.query_start_loc.gpu[: count + 1],
            self.positions[:total] - shift.to(self.positions.device),
        )

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """When all layers have attended, requests take note."""
        given = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self.compression is not None:
            self.compression.end()
        return given
