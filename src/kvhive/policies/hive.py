"""Hive: two ranks of every token in the whole model, by what the prompt and its repetition read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts.cells import winners
from kvhive.policies._parts.fading import add_squares
from kvhive.policies._parts.ranking import shares_below
from kvhive.policies._parts.repetition import among_the_repeated, most_attention
from kvhive.policies._parts.selection import recent, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy, Reconstruction
from kvhive.slots import Column, Slots
from kvhive.spec import knob

FIRST = 2.0  # added to the score of a cell's best: more than any rank


@POLICIES.register("hive")
@dataclass(frozen=True)
class Hive(Policy):
    source: ClassVar[str] = "ours"
    cost: ClassVar[str] = "one more prefill; 8 bytes a slot"
    allocation: ClassVar[str] = "global(floor=0.2)"

    sink: int = knob(4, "first tokens kept for ever", least=0)
    window: int = knob(32, "newest tokens that always stay", least=1)
    observed: int = knob(128, "last queries whose attention counts", least=1, most=2**12)
    pool: int = knob(7, "tokens that it is pooled over", least=1, most=1023)
    reconstruct: bool = knob(True, "repeat the context")
    chunk: int = knob(1024, "tokens that are repeated at a time", least=1)
    cell: int = knob(0, "0: off", least=0)

    @property
    def needs(self) -> Needs:
        return Needs(last_rows=self.observed)

    @property
    def reconstruction(self) -> Reconstruction | None:
        return Reconstruction(self.chunk) if self.reconstruct else None

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"votes": Column(), "repeated": Column()}

    @property
    def sizing(self) -> Sizing:
        return Sizing(least=self.sink + self.window + 1)

    def observe(self, slots: Slots, seen: Observed) -> None:
        assert seen.rows is not None
        add_squares(slots["votes"], slots, seen.rows, self.observed)

    def observe_reconstruction(self, slots: Slots, seen: Observed, repeated: Tensor) -> None:
        given = most_attention(slots, seen, among_the_repeated(slots, seen, repeated, self.sink))
        score = slots["repeated"]
        score.copy_(torch.where(repeated, given, score))

    def score(self, slots: Slots, held: Held) -> Tensor:
        return self._ranked([slots])[0]

    @classmethod
    def score_all(
        cls, policies: Sequence[Policy], slots: Sequence[Slots], helds: Sequence[Held]
    ) -> list[Tensor | None]:
        return list(policies[0]._ranked(slots))

    def _ranked(self, slots):
        import os
        parts = os.environ.get("PARTS", "ab")
        valid = [one.valid for one in slots]
        votes = [
            F.max_pool1d(one["votes"].masked_fill(~v, 0.0), self.pool, stride=1, padding=self.pool // 2)
            for one, v in zip(slots, valid, strict=True)
        ]
        attended = shares_below(votes, valid)
        known = [one["repeated"] > 0 for one in slots]
        repeated = shares_below([one["repeated"] for one in slots], known)
        if parts == "a": score = attended
        elif parts == "b": score = repeated
        elif parts == "max": score = [torch.maximum(a,r) for a,r in zip(attended,repeated)]
        elif parts == "prod": score = [(a*r).sqrt() for a,r in zip(attended,repeated)]
        elif parts.startswith("w"):
            w = float(parts[1:])
            score = [torch.where(k, w*a + (1-w)*r, a) for k, a, r in zip(known, attended, repeated)]
        else:
            score = [
                torch.where(k, (a + r) / 2, a)
                for k, a, r in zip(known, attended, repeated, strict=True)
            ]
        if self.cell:
            score = [s + FIRST * self._best(one, v, s) for one, v, s in zip(slots, valid, score)]
        return score

    def _best(self, slots, valid, score):
        cell = slots.position.long().clamp_min(0) // self.cell
        cell = cell - cell[..., :1]
        n = score.shape[-1]
        place = torch.unique_consecutive
        first = F.pad((cell[..., 1:] != cell[..., :-1]).cumsum(-1), (1, 0))
        return winners(first, valid, score).float()

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        first = sinks(slots, self.sink)
        return first | recent(slots, (budget - self.sink).clamp(0, self.window))
