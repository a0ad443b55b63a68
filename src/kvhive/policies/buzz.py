"""BUZZ: a beehive of cells in which the local heavy hitter survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import NOTHING, Needs, Observed
from kvhive.policies._parts import cells as hive
from kvhive.policies._parts.cells import Regions
from kvhive.policies._parts.selection import recent
from kvhive.policies.base import POLICIES, Policy, Positions, knob
from kvhive.slots import Column, Slots

SMALL = 32  # budgets below this get one sink instead of four


@POLICIES.register("buzz")
@dataclass(frozen=True)
class Buzz(Policy):
    """Sinks, a window, and between them a sample of the past that thins out with age.

    The cache is `[sinks | sample | fresh | window]`; fresh is what has left the window since the
    last event. When sample and fresh together exceed the threshold, the sample is thinned (every
    ceil(stride/2)-th entry stays) and each block of `stride` fresh tokens hands its most attended
    token to the sample. A prompt too long for one event is thinned further at once ("drain").
    `history="log"` keeps the past in generations instead, see `docs/methods/buzz.md`.

    Source: Zhao et al. 2024, arXiv:2410.23079; the authors' code where the two differ. Ties: the
    older token. State: float32 score per slot (not for `no_max`), one sample size per head.
    """

    source: ClassVar[str] = "arXiv:2410.23079"
    cost: ClassVar[str] = "column sums (accum, fast) or none (no_max); copies once in ~0.55 budget"
    positions: ClassVar[Positions] = "cache"

    variant: Literal["accum", "fast", "no_max"] = knob(
        "accum", "a cell's judge: attention since arrival, attention of this step, or none"
    )
    sink: int | None = knob(None, "first tokens kept for ever; default 4 (1 below a budget of 32)")
    window: int | None = knob(None, "most recent tokens kept; default 2/7 of budget - sink")
    threshold: int | None = knob(None, "sample + fresh before an event; default: the rest")
    stride: int = knob(5, "fresh tokens to a cell")
    prefill: Literal["step", "streamed"] = knob(
        "step", "a prompt is one step, or bookkeeping as if its tokens came one by one"
    )
    prefill_stride: Literal["fit"] | None = knob(
        None, "'fit': in the first event only, the least stride that meets the budget"
    )
    drain: bool = knob(True, "thin an over-full sample at once, not token by token")
    match: Literal["peak", "mean"] = knob("peak", "what the budget bounds: the peak, or the mean")
    history: Literal["thin", "log"] = knob("thin", "thin by place, or keep log n generations")
    cells: int | None = knob(None, "history='log': cells a generation; default: from the budget")
    allow_unbounded: bool = knob(False, "permit stride 1 or 2, with which nothing is ever thinned")

    def __post_init__(self) -> None:
        for name, least in (("sink", 0), ("window", 1), ("threshold", 2), ("cells", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"buzz: {name} must be at least {least}, got {value}")
        _one_of("variant", self.variant, ("accum", "fast", "no_max"))
        _one_of("prefill", self.prefill, ("step", "streamed"))
        _one_of("prefill_stride", self.prefill_stride, (None, "fit"))
        _one_of("match", self.match, ("peak", "mean"))
        _one_of("history", self.history, ("thin", "log"))
        if self.stride < 1:
            raise ValueError(f"buzz: stride must be at least 1, got {self.stride}")
        if self.history == "log":
            self._check_log()
        else:
            self._check_thin()

    def _check_thin(self) -> None:
        if self.cells is not None:
            raise ValueError(f"buzz: cells={self.cells} is for history='log' only")
        if self.match == "mean" and not (self.window is None and self.threshold is None):
            raise ValueError("buzz: match='mean' sizes window and threshold itself; leave them out")
        if self.old_stride > 1:
            return
        if not self.allow_unbounded:
            raise ValueError(
                f"buzz: stride must be at least 3, got {self.stride}; with 1 or 2 old tokens are "
                "never thinned and the cache grows for ever (allow_unbounded=True permits that)"
            )
        if self.prefill == "streamed":
            raise ValueError(
                f"buzz: prefill='streamed' needs a stride of 3 or more, got {self.stride}"
            )

    def _check_log(self) -> None:
        for name in ("prefill", "prefill_stride", "drain", "match", "allow_unbounded"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"buzz: {name} is for history='thin' only")
        if self.threshold is not None and self.threshold < 2 * self.stride:
            raise ValueError(
                "buzz: history='log' needs a threshold of at least 2 * stride = "
                f"{2 * self.stride}, got {self.threshold}"
            )

    @property
    def old_stride(self) -> int:
        """s' = ceil(stride / 2): of the old sample every s'-th entry survives an event."""
        return (self.stride + 1) // 2

    @property
    def needs(self) -> Needs:
        """Column sums, unless a cell's first token is taken."""
        return NOTHING if self.variant == "no_max" else Needs(columns="sum")

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score, and a cell's generation for `history="log"`."""
        score = {} if self.variant == "no_max" else {"score": Column()}
        return score | ({"level": Column(torch.uint8)} if self.history == "log" else {})

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """The sample size of each head."""
        return {"sample": torch.int32}

    @property
    def least_budget(self) -> int:
        """Sinks, window, and the smallest threshold with which events make room."""
        room = 2 * self.stride if self.history == "log" else 2
        if self.window is None and self.threshold is not None:
            room = self.threshold
        window = self.window or max(1, math.ceil(room * 2 / 5))
        sink = self._given_sink
        if sink is None:
            sink = 1 if 4 + room + window <= SMALL else 4
        return sink + room + window

    @property
    def takes_own_size(self) -> bool:
        """`history="log"` with cells and window given sizes itself, O(log n)."""
        return self.cells is not None and self.window is not None

    @property
    def implied_budget(self) -> int | None:
        """sink + window + threshold, when all are given."""
        if self.window is None or self.threshold is None or self._given_sink is None:
            return None
        return self._given_sink + self.window + self.threshold

    def own_limit(self, seen: int) -> int | None:
        """sink + window + cells * (stride + generations of `seen` tokens)."""
        if self.cells is None or self.window is None or self._given_sink is None:
            return None
        room = self.cells * (self.stride + generations(seen, self.stride))
        return self._given_sink + self.window + room

    def peak(self, budget: int) -> int:
        """The most tokens held for a nominal budget: more than it when that is to be the mean."""
        if self.match == "peak":
            return budget
        sink = self._given_sink
        if sink is None:
            sink = 4 if budget >= SMALL else 1
        rho = (1 / self.stride) / (1 - 1 / self.old_stride + 1 / self.stride)
        return sink + round(1.4 * (budget - sink) / (0.4 + (1 + rho) / 2))

    def for_budget(self, tokens: int | None) -> Buzz:
        """As many sinks as the recipe's budget asks for, whatever room is made later."""
        if self._given_sink is not None:
            return self
        return replace(self, sink=4 if tokens is None or tokens >= SMALL else 1)

    def slack(self, budget: int) -> int:
        """None: an event frees many slots anyway."""
        return 0

    def observe(self, slots: Slots, seen: Observed) -> None:
        """accum: add the step's column sums; fast: only this step's count."""
        if seen.columns is None:
            return
        if self.variant == "accum":
            slots["score"].add_(seen.columns)
        else:
            slots["score"].copy_(seen.columns)

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """Events where a head is over its budget; see the class.

        A budget with no room for a sample (making room for a long turn may ask for one) leaves the
        sinks and the newest tokens.
        """
        regions, counter = self._regions(budget), slots.counters["sample"]
        least = self.stride if self.history == "log" else 2  # below it events need not make room
        over, bare = slots.count > budget, regions.room < least
        rule = self._log if self.history == "log" else self._thin
        held = rule(slots, regions, over & ~bare)
        ends = slots.valid & (slots.rank < regions.sink[..., None])
        ends = ends | recent(slots, budget - regions.sink)
        alive, sample = hive.choose(over & bare, (ends, torch.zeros_like(budget)), held)
        if self.history == "log":
            slots["level"].masked_fill_((over & bare)[..., None], 0)
        counter.copy_(torch.where(over, sample.to(counter.dtype), counter))
        return alive

    @property
    def _given_sink(self) -> int | None:
        """The number of sinks where the knobs alone decide it; None where the budget does."""
        if self.sink is not None:
            return self.sink
        sized = self.threshold is not None or self.cells is not None
        return 4 if sized and self.window is not None else None

    def _regions(self, budget: Tensor) -> Regions:
        given = self._given_sink
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

    def _score(self, slots: Slots) -> Tensor | None:
        return None if self.variant == "no_max" else slots["score"]

    def _thin(self, slots: Slots, regions: Regions, over: Tensor) -> tuple[Tensor, Tensor]:
        held = slots.valid, slots.counters["sample"].long()
        if self.prefill == "step":
            held = hive.choose(over, self._event(slots, *held, slots.count, regions), held)
            return self._drain(*held, regions, over) if self.drain else held
        most = regions.budget
        while bool(over.any()):  # as if tokens came one by one: an event whenever one is too many
            held = hive.choose(over, self._event(slots, *held, most + 1, regions), held)
            over = over & (held[0].sum(-1) > most)
        return held

    def _event(
        self, slots: Slots, alive: Tensor, sample: Tensor, length: Tensor, regions: Regions
    ) -> tuple[Tensor, Tensor]:
        stride = torch.full_like(sample, self.stride)
        if self.prefill_stride == "fit":
            fit = hive.ceil_div(length - regions.sink - regions.window, regions.room.clamp_min(1))
            stride = torch.where(sample == 0, fit.clamp_min(1), stride)
        score = self._score(slots)
        return hive.event(alive, sample, length, score, regions, stride, self.old_stride)

    def _drain(
        self, alive: Tensor, sample: Tensor, regions: Regions, over: Tensor
    ) -> tuple[Tensor, Tensor]:
        held = alive, sample
        while self.old_stride > 1 and bool((full := over & (held[1] > regions.room)).any()):
            held = hive.choose(full, hive.thin(*held, regions.sink, self.old_stride), held)
        return held

    def _log(self, slots: Slots, regions: Regions, over: Tensor) -> tuple[Tensor, Tensor]:
        score, held = self._score(slots), slots["level"].long()
        stay, level, loose = hive.close_cells(
            slots.valid, held, slots.counters["sample"].long(), score, regions, self.stride
        )
        stay, level = hive.fold_generations(stay, level, score, self._cells(slots, regions.room))
        most = (regions.room - loose).clamp_min(1)
        stay, level = hive.merge_oldest(stay, level, score, most)
        slots["level"].copy_(torch.where(over[..., None], level, held))
        sample = (stay & (level > 0)).sum(-1)
        return hive.choose(over, (stay, sample), (slots.valid, sample))

    def _cells(self, slots: Slots, room: Tensor) -> Tensor:
        """Cells a generation: as given, or so that all fill three quarters of the room."""
        if self.cells is not None:
            return torch.full_like(room, self.cells)
        blocks = hive.ceil_div(hive.tokens_seen(slots), self.stride).clamp_min(1)
        cells, found = torch.ones_like(room), torch.zeros_like(room, dtype=torch.bool)
        for depth in range(1, int(blocks.max()).bit_length() + 1):
            tried = (3 * room // (4 * depth)).clamp_min(1)
            deepest = torch.frexp((1 + (blocks - 1) // tried).double()).exponent  # binary digits
            fits = ~found & (deepest <= depth)
            cells, found = torch.where(fits, tried, cells), found | fits
        return cells


def generations(seen: int, stride: int) -> int:
    """The most generations a history of `seen` tokens can have: cells of one span stride * 2^(g-1).

    The number of binary digits of ceil(seen / stride), at least 1.
    """
    return max(1, (-(-seen // stride)).bit_length())


def _one_of(knob_name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"buzz: {knob_name} must be one of {allowed}, got {value!r}")
