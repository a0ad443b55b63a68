"""BUZZ: a beehive of cells in which the local heavy hitter survives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts import cells as hive
from kvhive.policies._parts import regions as region
from kvhive.policies._parts.regions import SMALL, Regions, Sizes
from kvhive.policies._parts.sizing import Sizing, no_slack
from kvhive.policies.base import POLICIES, Choice, Policy, Positions
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("buzz")
@dataclass(frozen=True)
class Buzz(Policy):
    """Sinks, a window, and between them a sample of the past that thins out with age.

    The cache is `[sinks | sample | fresh | window]`; fresh is what has left the window since the
    last event. When sample and fresh together exceed the threshold, the sample is thinned (every
    ceil(stride/2)-th entry stays) and each block of `stride` fresh tokens hands its most attended
    token to the sample. A prompt too long for one event is thinned further at once ("drain").
    Policy `buzz_log` keeps the past in generations instead.

    Source: Zhao et al. 2024, arXiv:2410.23079; the authors' code where the two differ. Ties: the
    older token. State: float32 score per slot (not for `no_max`), one sample size per head.
    """

    source: ClassVar[str] = "arXiv:2410.23079"
    cost: ClassVar[str] = "column sums (accum, fast) or none (no_max); copies once in ~0.55 budget"
    renamed: ClassVar[Mapping[str, str]] = {"history=log": "buzz_log"}

    variant: Literal["accum", "fast", "no_max"] = knob(
        "accum", "a cell's judge: attention since arrival, attention of this step, or none"
    )
    sink: int | None = knob(
        None, "first tokens kept for ever; default 4 (1 below a budget of 32)", least=0
    )
    window: int | None = knob(
        None, "most recent tokens kept; default 2/7 of budget - sink", least=1
    )
    threshold: int | None = knob(None, "sample + fresh before an event; default: the rest", least=2)
    stride: int = knob(5, "fresh tokens to a cell", least=1)
    prefill: Literal["step", "streamed"] = knob(
        "step", "a prompt is one step, or bookkeeping as if its tokens came one by one"
    )
    prefill_stride: Literal["fit", "same"] | None = knob(
        None,
        "of the first event: 'fit' (the least that meets the budget) or the 'same'; default: the "
        "preset's, 'same' where a prompt is streamed",
    )
    drain: bool = knob(True, "thin an over-full sample at once, not token by token")
    match: Literal["peak", "mean"] = knob("peak", "what the budget bounds: the peak, or the mean")
    preset: Literal["best", "paper"] = knob(
        "best", "'best', by measurement: prefill_stride=fit, positions=original; 'paper': neither"
    )
    allow_unbounded: bool = knob(False, "permit stride 1 or 2, with which nothing is ever thinned")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @property
    def old_stride(self) -> int:
        """s' = ceil(stride / 2): of the old sample every s'-th entry survives an event."""
        return (self.stride + 1) // 2

    @property
    def position_rule(self) -> Positions:
        """As released, positions are counted inside the cache."""
        return "cache" if self.preset == "paper" else "original"

    @property
    def needs(self) -> Needs:
        """Column sums, unless a cell's first token is taken."""
        return region.judged_by(self.variant)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score."""
        return {} if self.variant == "no_max" else {"score": Column()}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """The sample size of each head."""
        return {"sample": torch.int32}

    @property
    def sizing(self) -> Sizing:
        """Sinks, window, and the smallest threshold with which events make room; an event frees
        many slots anyway.
        """
        implied = None
        sizes = self._sizes
        if self.window is not None and self.threshold is not None:
            assert sizes.given_sink is not None
            implied = sizes.given_sink + self.window + self.threshold
        return Sizing(
            least=sizes.least(2),
            implied=implied,
            peak=self._peak,
            outlasting=sizes.outlasting,
            slack=no_slack,
        )

    def _peak(self, budget: int) -> int:
        """The most tokens held for a nominal budget: more than it when that is to be the mean."""
        if self.match == "peak":
            return budget
        sink = self._sizes.given_sink
        if sink is None:
            sink = 4 if budget >= SMALL else 1
        rho = (1 / self.stride) / (1 - 1 / self.old_stride + 1 / self.stride)
        return sink + round(1.4 * (budget - sink) / (0.4 + (1 + rho) / 2))

    def for_layer(self, layer: int, layers: int, tokens: int | None) -> Buzz:
        """As many sinks as the recipe's budget asks for, whatever room is made later."""
        return replace(self, sink=self._sizes.sink_of(tokens))

    def observe(self, slots: Slots, seen: Observed) -> None:
        """The judge's opinion."""
        region.observe(self.variant, slots, seen)

    @property
    def scores(self) -> bool:
        """Unless a cell's first token is taken."""
        return self.variant != "no_max"

    def score(self, slots: Slots, held: Held) -> Tensor | None:
        """The judge's opinion, by which heads may compete for room."""
        return region.scores(self.variant, slots)

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """Sinks and window."""
        return self._sizes.regions(budget).ends(slots)

    def choose(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Choice:
        """Events where a head is over its budget; see the class.

        A budget with no room for a sample (making room for a long turn may ask for one) leaves the
        sinks and the newest tokens.
        """
        regions, counter = self._sizes.regions(budget), slots.counters["sample"]
        over, bare = slots.count > budget, regions.room < 2
        held = self._thin(slots, regions, over & ~bare)
        nothing = torch.zeros_like(budget)
        keep, sample = hive.choose(over & bare, (regions.bare(slots), nothing), held)
        return Choice(keep, counters={"sample": sample.to(counter.dtype)})

    @property
    def _fits_first(self) -> bool:
        if self.prefill_stride is not None:
            return self.prefill_stride == "fit"
        return self.preset == "best" and self.prefill == "step"

    @property
    def _sizes(self) -> Sizes:
        decided = self.window is not None and self.threshold is not None
        return Sizes(self.sink, self.window, self.threshold, decided)

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
        if self._fits_first:
            fit = hive.ceil_div(length - regions.sink - regions.window, regions.room.clamp_min(1))
            stride = torch.where(sample == 0, fit.clamp_min(1), stride)
        score = region.scores(self.variant, slots)
        return hive.event(alive, sample, length, score, regions, stride, self.old_stride)

    def _drain(
        self, alive: Tensor, sample: Tensor, regions: Regions, over: Tensor
    ) -> tuple[Tensor, Tensor]:
        held = alive, sample
        while self.old_stride > 1 and bool((full := over & (held[1] > regions.room)).any()):
            held = hive.choose(full, hive.thin(*held, regions.sink, self.old_stride), held)
        return held
