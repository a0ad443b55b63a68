"""Scissorhands: what recent queries found unimportant stays unimportant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import TOGETHER, Needs, Observed
from kvhive.policies._parts import votes
from kvhive.policies._parts.selection import keep_top, recent
from kvhive.policies._parts.sizing import Sizing, no_slack
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob

MOST = 400  # queries remembered by default, and the width of the ring unless history= sets it


@POLICIES.register("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Policy):
    """Drop, many at a time, the tokens that most of the recent queries found unimportant.

    A query that has seen t tokens finds a key unimportant if it gives it less than 1/t of its
    attention. Over budget, tokens are ranked by how many of the last `history` queries (of all
    query heads of the group) found them so; the worst go, except the `recent` newest, until
    `budget - drop + 1` are left. Ties, which are frequent: the older token goes.

    The code that was released does something else: policy `scissorhands_percentile`.
    Source: Liu et al. 2023, arXiv:2305.17118, algorithms 1 and 2. State: `history` bits per slot,
    times the binary digits of the group size.
    """

    source: ClassVar[str] = "arXiv:2305.17118"
    cost: ClassVar[str] = (
        "the last 400 rows of a prompt, then each row; 50 bytes a slot (GQA of 4: 150)"
    )
    renamed: ClassVar[Mapping[str, str]] = {"variant=percentile": "scissorhands_percentile"}

    history: int | None = knob(
        None, "queries remembered; default min(400, 2 * budget)", least=1, most=2**16
    )
    recent: int | None = knob(None, "newest tokens kept; default min(10, budget / 4)", least=0)
    drop: int | None = knob(None, "tokens freed at a time, less one; default budget / 2", least=1)
    threshold: Literal["seen", "cache"] = knob(
        "seen", "an even share: 1 / tokens seen by the query, or 1 / keys it could see ('cache')"
    )

    @property
    def needs(self) -> Needs:
        """The rows of the last `history` queries."""
        return Needs(last_rows=self._ring, together=min(TOGETHER, self._ring))

    @property
    def columns(self) -> Mapping[str, Column]:
        """The votes (more bytes once the group size is known)."""
        return {"low": Column(torch.uint8, (1, votes.ring_bytes(self._ring)))}

    @property
    def sizing(self) -> Sizing:
        """Enough that more than the recent tokens is left after a drop, which frees many slots."""
        if self.recent is None:
            least = self.drop or 1
        else:
            least = self.recent + self.drop if self.drop else max(1, 2 * self.recent - 1)
        return Sizing(least=least, slack=no_slack)

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Remember what each of the last queries found unimportant: p < its even share."""
        assert seen.rows is not None
        width = votes.ring_bytes(self._ring)
        for rows, voters, share in votes.blocks(slots, seen.rows, self.threshold):
            low = (rows < share[:, :, None, :, None]).sum(2, dtype=torch.uint8)
            votes.hide_unseen(low, slots, voters)
            planes = rows.shape[2].bit_length()
            slots.reshape("low", (planes, width))
            ring = slots["low"].view(*slots["low"].shape[:2], -1, width)  # each digit has its own
            place = torch.arange(planes, dtype=torch.uint8, device=low.device)
            digits = ((low[..., None] >> place) & 1).flatten(3)
            votes.record(ring, digits, voters)

    def select(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Tensor:
        """Drop the worst of the older tokens down to `budget - drop + 1`."""
        drop = torch.full_like(budget, self.drop) if self.drop else (budget // 2).clamp_min(1)
        stay = (budget - drop + 1).clamp_min(1)
        size = torch.full_like(budget, self.recent or 0)
        if self.recent is None:
            size = (budget // 4).clamp_max(10)
        size = torch.minimum(size, stay - 1)
        window = recent(slots, size)
        lows = self._lows(slots, budget)
        ranked = keep_top(-lows, slots.valid & ~window, stay - size, newer_first=True)
        return window | ranked

    def _lows(self, slots: Slots, budget: Tensor) -> Tensor:
        """int64 `[b, K, n]`: how often the remembered queries found each slot unimportant."""
        rows = torch.full_like(budget, self._ring)
        if self.history is None:
            rows = torch.minimum(rows, 2 * budget)
        newest = slots.position.amax(-1)
        planes = slots["low"].unbind(3)
        return sum(
            (votes.count(low, newest, rows) << plane for plane, low in enumerate(planes)),
            torch.zeros_like(budget)[..., None],
        )

    @property
    def _ring(self) -> int:
        """Queries there are bits for: the most that may ever be remembered."""
        return self.history or MOST
