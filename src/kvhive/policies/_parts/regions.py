"""A BUZZ budget cut into regions: sinks | history and fresh tokens | window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvhive.kernels import NOTHING, TOGETHER, Needs, Observed
from kvhive.policies._parts.selection import recent
from kvhive.slots import Slots

SMALL = 32  # budgets below this get one sink instead of four
Judge = Literal["accum", "fast", "no_max"]


@dataclass(frozen=True, eq=False)
class Regions:
    """A head's budget by region, int64 `[b, K]` each: sinks, room for history and fresh, window."""

    sink: Tensor
    room: Tensor
    window: Tensor

    @property
    def budget(self) -> Tensor:
        """Their sum."""
        return self.sink + self.room + self.window

    def ends(self, slots: Slots) -> Tensor:
        """bool `[b, K, n]`: the sinks and the window."""
        return self._sinks(slots) | recent(slots, self.window)

    def bare(self, slots: Slots) -> Tensor:
        """bool `[b, K, n]`: the sinks and the newest tokens, where there is no room for more."""
        return self._sinks(slots) | recent(slots, self.budget - self.sink)

    def _sinks(self, slots: Slots) -> Tensor:
        return slots.valid & (slots.rank < self.sink[..., None])


@dataclass(frozen=True)
class Sizes:
    """The knobs that size regions; None where the budget decides.

    decided: whether the knobs alone decide all sizes, so that the number of sinks is settled too.
    """

    sink: int | None
    window: int | None
    threshold: int | None
    decided: bool

    @property
    def given_sink(self) -> int | None:
        """The number of sinks where the knobs alone decide it."""
        return 4 if self.sink is None and self.decided else self.sink

    def sink_of(self, tokens: int | None) -> int:
        """The number of sinks at a budget of `tokens` (None: a share)."""
        if self.given_sink is not None:
            return self.given_sink
        return 4 if tokens is None or tokens >= SMALL else 1

    def least(self, room: int) -> int:
        """Sinks, window, and `room`: the least with which events make room."""
        if self.window is None and self.threshold is not None:
            room = self.threshold
        window = self.window or max(1, math.ceil(room * 2 / 5))
        sink = self.given_sink
        if sink is None:
            sink = 1 if 4 + room + window <= SMALL else 4
        return sink + room + window

    def outlasting(self, held: int) -> int:
        """All but the window, from which nothing is dropped before it leaves."""
        return max(0, held - int(self.regions(torch.tensor([[held]])).window))

    def regions(self, budget: Tensor) -> Regions:
        """Of a budget int64 `[b, K]`; by default the window is 2/7 of all but the sinks."""
        given = self.given_sink
        sink = torch.where(budget < SMALL, 1, 4)
        if given is not None:
            sink = torch.full_like(budget, given)
        if self.window is not None:
            window = torch.full_like(budget, self.window)
        elif self.threshold is not None:
            window = budget - sink - self.threshold
        else:
            window = ((budget - sink) * (2 / 7)).round().long()
        window = window.clamp_min(1)
        return Regions(sink, budget - sink - window, window)


def judged_by(judge: Judge) -> Needs:
    """Column sums, unless a cell's first token is taken."""
    if judge == "no_max":
        return NOTHING
    return Needs(columns="sum", together=TOGETHER if judge == "accum" else 1)


def observe(judge: Judge, slots: Slots, seen: Observed) -> None:
    """accum: add the step's column sums to the score; fast: only this step's count."""
    if seen.columns is None:
        return
    if judge == "accum":
        slots["score"].add_(seen.columns)
    else:
        slots["score"].copy_(seen.columns)


def scores(judge: Judge, slots: Slots) -> Tensor | None:
    """float32 `[b, K, n]`, or None where there is no judge."""
    return None if judge == "no_max" else slots["score"]
