"""SnapKV: the last queries of the prompt vote on what came before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts.selection import grouped, new_tokens, recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Keep the last `window` tokens, and the earlier ones that their queries attend to most.

    The window's attention is summed for each older token, reduced over the query heads of the group
    and smoothed along the sequence, so that a voted token brings its neighbours along. Ties: the
    older. While decoding, the votes of the last `window` queries go on being counted, and the cache
    is scored anew whenever it goes over budget. A chunk of a prompt counts as a prompt.

    Source: Li et al. 2024, arXiv:2404.14469; `SnapKVCluster` of the authors' code, of
    KVCache-Factory for groups. State: two float32 per slot (votes of this block of queries and of
    the one before), one count per head.
    """

    source: ClassVar[str] = "arXiv:2404.14469"
    cost: ClassVar[str] = "attention of the last `window` queries; 8 bytes a slot"

    window: int = knob(32, "last tokens, always kept, whose queries vote", least=1)
    kernel: int = knob(5, "tokens the votes are smoothed over, an odd number", most=1023)
    pooling: Literal["avg", "max"] = knob(
        "avg", "how they are smoothed; the paper's runs use max, 7"
    )
    group_reduce: Literal["mean", "max", "sum"] = knob(
        "mean", "how the votes of the query heads that share a KV head become one"
    )
    decode: Literal["rescore", "none"] = knob(
        "rescore", "evict while decoding too, or compress prompts only"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"snapkv: kernel must be an odd number, got {self.kernel}")

    @property
    def needs(self) -> Needs:
        """The window's rows of probabilities."""
        return Needs(last_rows=self.window)

    @property
    def columns(self) -> Mapping[str, Column]:
        """Votes of the current block of up to `window` queries, and of the block before it."""
        return {"votes": Column(), "before": Column()}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """Queries in the current block."""
        return {"voters": torch.int32}

    @property
    def sizing(self) -> Sizing:
        """The window and one more token; decoding evicts only with `decode="rescore"`."""
        return Sizing(least=self.window + 1, decoding=self.decode == "rescore")

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Add the votes of this step's last queries to the block, or begin a new one with them."""
        assert seen.rows is not None
        voters, fresh = slots.counters["voters"], seen.rows.count
        voted = new_tokens(slots, fresh).int() if slots.holes else fresh
        if self._may_be_full(slots, fresh):
            self._begin_block(slots, voters + voted > self.window)
        for block in seen.rows:
            self._add(slots, grouped(block, slots.heads))
        voters.add_(voted)

    def _may_be_full(self, slots: Slots, fresh: int) -> bool:
        """Whether so many voters more may begin a block; known exactly where all rows agree."""
        if slots.last is None:
            slots.notes.pop("voters", None)
            return True
        voters = slots.notes.get("voters", 0) + fresh
        full = voters > self.window
        slots.notes["voters"] = fresh if full else voters
        return full

    def _add(self, slots: Slots, rows: Tensor) -> None:
        """Add rows `[b, K, G, r, n]` to the votes."""
        if self.group_reduce == "max":  # of sums only, so that every query head counts for itself
            for column in self.columns:
                slots.reshape(column, rows.shape[2:3])
            slots["votes"].add_(rows.sum(3).transpose(-1, -2))
        else:
            weight = 1.0 / rows.shape[2] if self.group_reduce == "mean" else 1.0
            slots["votes"].add_(rows.sum((2, 3)), alpha=weight)

    def _begin_block(self, slots: Slots, full: Tensor) -> None:
        """Where the current block is full (bool `[b, K]`) it becomes the block before."""
        votes, before = slots["votes"], slots["before"]
        over = full.view(*full.shape, *[1] * (votes.dim() - 2))
        before.copy_(torch.where(over, votes, before))
        votes.masked_fill_(over, 0.0)
        slots.counters["voters"].masked_fill_(full, 0)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """Smoothed votes; those of the window count for nothing, also among its neighbours."""
        past = slots.valid & ~recent(slots, self.window)
        # The block before counts by the share of it that the last `window` queries still cover.
        share = (1.0 - slots.counters["voters"] / self.window)[..., None]
        votes, before = slots["votes"], slots["before"]
        if self.group_reduce == "max":
            votes = (votes + before * share[..., None]).amax(-1)
        else:
            votes = votes + before * share
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        # Beyond the ends, as among other slots, there are no votes, and votes are never negative.
        smooth: Tensor = pool(
            votes.masked_fill(~past, 0.0), self.kernel, stride=1, padding=self.kernel // 2
        )
        return smooth

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The window."""
        return recent(slots, budget.clamp_max(self.window))
