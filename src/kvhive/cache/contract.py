"""The part of transformers' contract of a cache layer that every kvhive layer answers alike."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvhive.slots import Slots
from kvhive.stores import Store


class LayerContract(CacheLayerMixin):
    """Sizes, rows of the batch, and offloading, of a layer that has seen `seen` tokens."""

    is_sliding = False
    is_compileable = False

    device: torch.device
    store: Store
    slots: Slots
    seen: int

    def get_seq_length(self) -> int:
        """Tokens SEEN, padding included, so that position ids stay right; not tokens kept."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens seen after this step, 0): the padding mask spans all that was seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit on what may be seen."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was (int64 `[new batch]`)."""
        raise TypeError(f"{type(self).__name__} does not re-index its rows")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.seen:
            rows = torch.arange(self.slots.batch, device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch (indices or a bool mask)."""
        if self.seen:
            rows = torch.arange(self.slots.batch, device=self.device)
            self.reorder_cache(rows[indices.to(self.device)])

    def offload(self) -> None:
        """Keys and values to the CPU."""
        self.store.to("cpu")

    def prefetch(self) -> None:
        """Keys and values back to the device they came from."""
        if self.is_initialized:
            self.store.to(self.device)
