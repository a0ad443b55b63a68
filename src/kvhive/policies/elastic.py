"""Elastic Cache: merge what a prompt can spare, then drop at one fixed place while generating."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts.selection import keep_top, layer_mean, new_tokens, recent, sinks
from kvhive.policies._parts.sizing import Sizing, no_slack
from kvhive.policies.base import POLICIES, Choice, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("elastic")
@dataclass(frozen=True)
class Elastic(Policy):
    """Fold the least attended prompt tokens into their neighbours; later drop one fixed slot.

    A step of several tokens is an instruction. Of all but the first `start` tokens and the last,
    those to which the layer paid least attention (summed over queries and all heads) are dropped;
    the key and value of each are averaged into those of the nearest token that stays, its anchor.
    Ties: the older token is dropped; the older of two equally near anchors takes it in. While
    single tokens are generated, slot F is dropped whenever there is one too many, so that the head
    of the prompt and all that is newest stay.
    Source: Liu et al. 2024, arXiv:2407.18121; the authors' code with the corrections listed in
    `docs/methods/elastic.md`. State: float32 score per slot, F per head.
    """

    source: ClassVar[str] = "arXiv:2407.18121"
    granularity: ClassVar[Literal["head", "layer", "model"]] = "layer"
    cost: ClassVar[str] = "column sums; a mean of what a prompt drops; 4 bytes a slot"

    start: int = knob(1, "first tokens kept for ever as they are", least=0)
    distance: int = knob(
        -25, "where slot F is: so far from the end of the prompt as kept; above 0, its index"
    )
    drop_ratio: float | None = knob(
        None, "in place of a budget: share of all tokens seen that is dropped; the cache grows"
    )
    merge: bool = knob(True, "average dropped prompt tokens into those kept, or lose them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_ratio is not None and not 0 <= self.drop_ratio < 1:
            raise ValueError(f"elastic: drop_ratio must lie in [0, 1), got {self.drop_ratio}")

    @property
    def needs(self) -> Needs:
        """Column sums."""
        return Needs(columns="sum")

    @property
    def columns(self) -> Mapping[str, Column]:
        """Attention received from the tokens of instructions."""
        return {"score": Column()}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """F, and whether the row's last step was an instruction."""
        return {"fixed": torch.int32, "encoding": torch.bool}

    @property
    def sizing(self) -> Sizing:
        """The first tokens, the last one, and an anchor between them at least; with `drop_ratio`,
        which says how many stay at every step, no budget and no slack.
        """
        least = self.start + 2
        if self.drop_ratio is None:
            return Sizing(least=least)
        return Sizing(least=least, budgeted=False, alone=self._limit, slack=no_slack)

    @property
    def merges(self) -> bool:
        """Unless switched off."""
        return self.merge

    def _limit(self, seen: int) -> int:
        """The most slots n for which int(n - seen * (1 - drop_ratio)) is 0, in double precision."""
        assert self.drop_ratio is not None
        share = seen * (1 - self.drop_ratio)
        limit = math.floor(share)
        while int(limit + 1 - share) < 1:
            limit += 1
        return max(limit, self.start + 2)

    def observe(self, slots: Slots, seen: Observed) -> None:
        """score += the column sums of an instruction; F follows its end."""
        arrived, encoding = new_tokens(slots, seen.fresh), slots.counters["encoding"]
        encoding.copy_((arrived > 1) | (encoding & (arrived == 0)))
        if seen.fresh > 1:
            assert seen.columns is not None
            slots["score"].add_(seen.columns * (arrived > 1)[..., None])
            slots.counters["fixed"].copy_(self._fixed(slots, slots.count, arrived > 1))

    def score(self, slots: Slots, held: Held) -> Tensor:
        """What the instruction's queries of all heads gave the token."""
        return layer_mean(slots["score"], slots.position)

    def choose(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Choice:
        """After an instruction both ends and the best anchors; else all but slot F."""
        encoding, limits = slots.counters["encoding"], torch.minimum(slots.count, budget)
        later = slots.valid & ~self._surplus(slots, budget)
        if not bool(encoding.any()):
            return Choice(later)
        assert score is not None
        ends = self._ends(slots)
        number = budget - ends.sum(-1)
        anchors = keep_top(score, slots.valid & ~ends, number, newer_first=True)
        keep = torch.where(encoding[..., None], ends | anchors, later)
        return Choice(
            keep,
            into=self._anchors(slots, keep) if self.merge else None,
            counters={"fixed": self._fixed(slots, limits, encoding)},
        )

    def _anchors(self, slots: Slots, keep: Tensor) -> Tensor:
        """int64 `[b, K, n]`: where each token of an instruction that is dropped goes, else -1; the
        nearest anchor by position, the older of two.
        """
        encoding = slots.counters["encoding"]
        anchor, position, n = keep & ~self._ends(slots), slots.position, slots.length
        place = torch.arange(n, device=keep.device).expand_as(anchor)
        older = place.masked_fill(~anchor, -1).cummax(-1).values
        newer = place.masked_fill(~anchor, n).flip(-1).cummin(-1).values.flip(-1)
        back = position - position.gather(-1, older.clamp_min(0))
        ahead = position.gather(-1, newer.clamp_max(n - 1)) - position
        target = torch.where((newer == n) | ((older >= 0) & (back <= ahead)), older, newer)
        return target.masked_fill(keep | ~slots.valid | ~encoding[..., None], -1)

    def _ends(self, slots: Slots) -> Tensor:
        """bool: the first tokens and the last, which instructions neither drop nor merge into."""
        return sinks(slots, self.start) | recent(slots, 1)

    def _fixed(self, slots: Slots, end: Tensor, where: Tensor) -> Tensor:
        """F, `where` (bool `[b, K]`) an instruction leaves `end` (int `[b, K]`) slots."""
        return torch.where(where, end + self.distance, slots.counters["fixed"]).int()

    def _surplus(self, slots: Slots, budget: Tensor) -> Tensor:
        """bool: what dropping slot F costs until `budget` are left; never the newest token."""
        fixed = slots.counters["fixed"].long()
        if self.distance > 0:
            fixed = torch.full_like(fixed, self.distance)
        first = torch.minimum(fixed.clamp_min(self.start), budget - 1).clamp_min(0)
        rank = slots.rank
        return (rank >= first[..., None]) & (rank < (first + slots.count - budget)[..., None])
