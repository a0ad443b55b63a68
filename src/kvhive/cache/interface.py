"""What transformers asks of a layer of its caches, answered from what all of our layers share."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvhive.cache.progress import Progress
from kvhive.policies import Policy
from kvhive.slots import Slots


class CacheLayer(CacheLayerMixin):
    """The part of a layer that only says how things stand, or passes a call on.

    policy: who decides. progress: what all layers of the cache share, `place` being this one's
    among them. slots: what is held; evicted: whether anything ever went. _waiting: keys and values
    handed in and not attended to yet.
    """

    is_sliding = False
    is_compileable = False

    policy: Policy
    progress: Progress
    place: int
    device: torch.device
    slots: Slots
    evicted: bool
    _waiting: tuple[Tensor, Tensor] | None

    def get_seq_length(self) -> int:
        """Tokens SEEN, padding included, so that position ids stay right; not tokens kept."""
        waiting = 0 if self._waiting is None else self._waiting[0].shape[2]
        return self.progress.seen_by(self.place) + waiting

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens seen after this step, 0): the padding mask spans all that was seen."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit on what may be seen."""
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take the newest tokens back without a trace."""
        return self.progress.recording or not (self.evicted or self.policy.needs.votes)

    @property
    def record_past(self) -> bool:
        """Whether votes and evictions wait for `crop`."""
        return self.progress.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self.progress.recording = self.progress.opening = recording

    def activate_past_recording(self) -> None:
        """Postpone votes and evictions until `crop`, as speculative decoding needs it.

        What comes first is taken for a prompt with its first draft, all later steps for drafts.
        """
        if self.place == 0:
            self.record_past = True

    @abstractmethod
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was (int64 `[new batch]`)."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        rows = torch.arange(self.slots.batch, device=self.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch (indices or a bool mask)."""
        if self.slots.length:
            rows = torch.arange(self.slots.batch, device=self.device)
            self.reorder_cache(rows[indices.to(self.device)])

    def offload(self) -> None:
        """Refused: attention reads the store where it lies. Raises `ValueError`."""
        raise ValueError(
            "a HiveCache cannot be offloaded: attention reads its keys and values where they lie; "
            "use a smaller budget, or transformers' own cache with offloading"
        )

    prefetch = offload
