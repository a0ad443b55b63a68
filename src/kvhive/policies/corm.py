"""CORM: a token stays as long as one of the recent queries found it important."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import TOGETHER, Needs, Observed
from kvhive.policies._parts import votes
from kvhive.policies._parts.selection import keep_top, recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob

MOST, LEAST = 256, 16  # bounds of history and recent where the tokens seen decide them
UNBOUNDED = 1 << 40


@POLICIES.register("corm")
@dataclass(frozen=True)
class Corm(Policy):
    """Keep what any of the last `history` queries gave more than its even share, and a recent few.

    A query that has seen t tokens finds a key important if it gives it at least 1/t of its
    attention; for a KV head, if any query head of the group does. A token stays while one of the
    last `history` queries found it important or it is among the `recent` newest. Nothing is dropped
    before `history` queries were seen. The size follows the content, head by head; nothing bounds
    it but `cap`.

    With a budget (`corm@0.4`) nothing is dropped until a head exceeds it; then the rule is applied,
    and if more remain than allowed, the tokens with most votes stay (ties: the newer).
    Source: Dai et al. 2024, arXiv:2404.15949; no code was released. State: `history` bits per slot.
    """

    source: ClassVar[str] = "arXiv:2404.15949"
    cost: ClassVar[str] = "the last 256 rows of a prompt, then each row; 32 bytes a slot"

    history: int | None = knob(
        None,
        "queries remembered; default min(256, budget), without one seen / 16 in 16..256",
        least=1,
    )
    recent: int | None = knob(
        None, "newest tokens kept; default budget / 4, without one seen / 16 in 16..256", least=1
    )
    threshold: Literal["seen", "cache"] = knob(
        "seen", "an even share: 1 / tokens seen by the query, or 1 / keys it could see ('cache')"
    )
    cap: int | None = knob(None, "most tokens a head holds although it has no budget", least=1)
    every: int = knob(
        1, "without a budget: evict when the tokens seen are a multiple of this", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and self.cap < self.sizing.least:
            raise ValueError(
                f"corm: cap must be at least recent + 1 = {self.sizing.least}, got {self.cap}"
            )

    @property
    def needs(self) -> Needs:
        """The rows of the last `history` queries."""
        return Needs(last_rows=self._ring, together=min(TOGETHER, self._ring))

    @property
    def columns(self) -> Mapping[str, Column]:
        """The votes, a bit for each query remembered."""
        return {"votes": Column(torch.uint8, (votes.ring_bytes(self._ring),))}

    @property
    def sizing(self) -> Sizing:
        """The recent tokens, and one more; it can always size itself."""
        return Sizing(least=1 if self.recent is None else self.recent + 1, alone=self._limit)

    def _limit(self, seen: int) -> int:
        """0 (select, and size yourself) once enough queries were seen, if it is time."""
        remembered = int(self._remembered(torch.tensor(self.cap or UNBOUNDED), torch.tensor(seen)))
        due = seen >= remembered and seen % self.every == 0
        return 0 if due else min(seen, self.cap or seen)

    @property
    def even(self) -> bool:
        """A head holds as many tokens as were voted for."""
        return False

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Push a row of bits for each query: p >= its even share."""
        assert seen.rows is not None
        for rows, voters, share in votes.blocks(slots, seen.rows, self.threshold):
            important = rows.amax(2) >= share[..., None]
            votes.record(slots["votes"], important, voters)

    def select(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Tensor:
        """What was voted for and what is recent; the most voted for, if that is too much."""
        bound = torch.where(budget > 0, budget, UNBOUNDED).clamp_max(self.cap or UNBOUNDED)
        newest = slots.position.amax(-1).long()
        remembered = self._remembered(bound, newest + 1)
        count = votes.count(slots["votes"], newest, remembered)
        early = (newest + 1 < remembered)[..., None]
        size = self._recent(bound, newest + 1)
        tail = recent(slots, size)
        voted = slots.valid & ~tail & ((count > 0) | early)
        return tail | keep_top(count, voted, bound - size, newer_first=True)

    @property
    def _ring(self) -> int:
        """Queries there are bits for: the most that may ever be remembered."""
        return self.history or min(MOST, self.cap or MOST)

    def _remembered(self, bound: Tensor, seen: Tensor) -> Tensor:
        """int64, as `bound`: queries to remember, by the bound on tokens held or by those seen."""
        if self.history is not None:
            return torch.full_like(bound, self.history)
        return torch.where(bound < UNBOUNDED, bound.clamp_max(MOST), _sixteenth(seen))

    def _recent(self, bound: Tensor, seen: Tensor) -> Tensor:
        """int64, as `bound`: recent tokens to keep."""
        if self.recent is not None:
            return torch.full_like(bound, self.recent)
        return torch.where(bound < UNBOUNDED, (bound // 4).clamp_min(1), _sixteenth(seen))


def _sixteenth(seen: Tensor) -> Tensor:
    return (seen // 16).clamp(LEAST, MOST)
