"""BUZZ: a beehive of cells in which the local heavy hitter survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import NOTHING, Needs, Observed
from kvhive.policies import cells as hive
from kvhive.policies.base import POLICIES, Policy, Positions, knob
from kvhive.slots import Column, Slots


@POLICIES.register("buzz")
@dataclass(frozen=True)
class Buzz(Policy):
    """Sinks, a window, and between them a sample of the past that thins out with age.

    The cache is `[sinks | sample | fresh | window]`; fresh is what has left the window since the last
    event. When sample and fresh together exceed the threshold, the sample is thinned (every
    ceil(stride/2)-th entry stays) and each block of `stride` fresh tokens hands its most attended
    token to the sample. A prompt too long for one event is thinned further at once ("drain").
    `history="log"` keeps the past in generations instead, see `docs/methods/buzz.md`.

    Source: Zhao et al. 2024, arXiv:2410.23079; the authors' code where the two differ. Ties: the older
    token. State: float32 score per slot (not for `no_max`), one sample size per head.
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
        _one_of("variant", self.variant, ("accum", "fast", "no_max"))
        _one_of("prefill", self.prefill, ("step", "streamed"))
        _one_of("prefill_stride", self.prefill_stride, (None, "fit"))
        _one_of("match", self.match, ("peak", "mean"))
        _one_of("history", self.history, ("thin", "log"))
        for name, least in (("sink", 0), ("window", 1), ("threshold", 2), ("cells", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"buzz: {name} must be at least {least}, got {value}")
        if self.stride < 1 or (self.stride < 3 and not self.allow_unbounded):
            raise ValueError(
                f"buzz: stride must be at least 3, got {self.stride}; with 1 or 2 old tokens are never "
                "thinned and the cache grows without bound (allow_unbounded=True permits that)"
            )
        if self.cells is not None and self.history != "log":
            raise ValueError(f"buzz: cells={self.cells} is for history='log' only")
        if self.history == "log" and (self.prefill, self.prefill_stride) != ("step", None):
            raise ValueError("buzz: history='log' has its own prefill; leave prefill knobs alone")

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
        """Sinks, window, and the smallest threshold."""
        threshold = self.threshold or (2 * self.stride if self.history == "log" else 2)
        sink = 1 if self.sink is None else self.sink
        window = self.window or max(1, math.ceil(threshold * 2 / 5))
        return sink + window + threshold

    @property
    def takes_own_size(self) -> bool:
        """`history="log"` with cells and window given sizes itself, O(log n)."""
        return self.cells is not None and self.window is not None

    @property
    def implied_budget(self) -> int | None:
        """sink + window + threshold, when all are given."""
        if self.window is None or self.threshold is None:
            return None
        return (4 if self.sink is None else self.sink) + self.window + self.threshold

    def own_limit(self, seen: int) -> int | None:
        """sink + window + cells * (stride + generations of `seen` tokens)."""
        if self.cells is None or self.window is None:
            return None
        sink = 4 if self.sink is None else self.sink
        return sink + self.window + self.cells * (self.stride + generations(seen, self.stride))

    def peak(self, budget: int) -> int:
        """The most tokens held for a nominal budget: more than it when its mean is to be matched."""
        if self.match == "peak":
            return budget
        sink = self._sink(budget)
        rho = (1 / self.stride) / (1 - 1 / self.old_stride + 1 / self.stride)
        return sink + round(1.4 * (budget - sink) / (0.4 + (1 + rho) / 2))

    def slack(self, budget: int) -> int:
        """None: an event frees many slots anyway."""
        return 0

    def observe(self, slots: Slots, seen: Observed) -> None:
        """accum: add the step's column sums; fast: only this step's count."""
        if self.variant == "accum":
            slots["score"].add_(seen.columns)
        elif self.variant == "fast":
            slots["score"].copy_(seen.columns)

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """Events where a head is over its budget; see the class."""
        rule = self._log if self.history == "log" else self._thin
        over = slots.count > budget
        alive, sample = rule(slots, budget)
        held = slots.counters["sample"]
        held.copy_(torch.where(over, sample.to(held.dtype), held))
        return alive

    def _sink(self, budget: int) -> int:
        return self.sink if self.sink is not None else (4 if budget >= 32 else 1)

    def _regions(self, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks, window and threshold of each head, int64 `[b, K]`, adding up to the budget."""
        few = torch.where(budget >= 32, 4, 1)
        sink = few if self.sink is None else torch.full_like(budget, self.sink)
        if self.window is not None:
            window = torch.full_like(budget, self.window)
        elif self.threshold is not None:
            window = budget - sink - self.threshold
        else:
            window = ((budget - sink) * (2 / 7)).round().long().clamp_min(1)
        return sink, window, budget - sink - window

    def _thin(self, slots: Slots, budget: Tensor) -> tuple[Tensor, Tensor]:
        sink, window, threshold = self._regions(budget)
        score = None if self.variant == "no_max" else slots["score"]
        alive, sample = slots.valid, slots.counters["sample"].long()
        stride = torch.full_like(budget, self.stride)
        while True:
            held = alive.sum(-1)
            over = held > budget
            if not bool(over.any()):
                return alive, sample
            length = torch.minimum(held, budget + 1) if self.prefill == "streamed" else held
            if self.prefill_stride == "fit":
                fit = hive.ceil_div(length - sink - window, threshold)
                stride = torch.where(sample == 0, fit.clamp_min(1), self.stride)
            stay, size = hive.event(
                alive, sample, length, score, sink, window, stride, self.old_stride
            )
            alive = torch.where(over[..., None], stay, alive)
            sample = torch.where(over, size, sample)
            if self.prefill == "step":
                return self._drain(alive, sample, sink, threshold) if self.drain else (alive, sample)

    def _drain(
        self, alive: Tensor, sample: Tensor, sink: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        while self.old_stride > 1 and bool((full := sample > threshold).any()):
            stay, size = hive.thin(alive, sample, sink, self.old_stride)
            alive = torch.where(full[..., None], stay, alive)
            sample = torch.where(full, size, sample)
        return alive, sample

    def _log(self, slots: Slots, budget: Tensor) -> tuple[Tensor, Tensor]:
        sink, window, room = self._regions(budget)
        score = None if self.variant == "no_max" else slots["score"]
        alive, sample, level = slots.valid, slots.counters["sample"].long(), slots["level"].long()
        over = (slots.count > budget)[..., None]
        old_end = (sink + sample)[..., None]
        rank = slots.rank
        blocks = (slots.count - sink - sample - window).clamp_min(0) // self.stride
        fresh = alive & (rank >= old_end) & (rank < old_end + (blocks * self.stride)[..., None])
        picked = hive.winners(((rank - old_end) // self.stride).clamp_min(0), fresh, score)
        level = torch.where(picked, 1, level)
        stay, level = hive.fold_generations(
            alive & (~fresh | picked), level, score, self._cells(slots, room)
        )
        loose = slots.count - sink - sample - window - blocks * self.stride
        stay = hive.merge_oldest(stay, level, score, (room - loose).clamp_min(1))
        slots["level"].copy_(torch.where(over, level, slots["level"].long()))
        return torch.where(over, stay, alive), (stay & (level > 0)).sum(-1)

    def _cells(self, slots: Slots, room: Tensor) -> Tensor:
        """Cells a generation: as given, or so that all generations fill half of the room."""
        if self.cells is not None:
            return torch.full_like(room, self.cells)
        seen = hive.tokens_seen(slots)
        depth = (1 + seen / self.stride).log2().ceil().clamp_min(1)
        return (room / 2 / depth).long().clamp_min(1)


def generations(seen: int, stride: int) -> int:
    """The most generations a history of `seen` tokens can have: cells of one span stride * 2^(g-1)."""
    return max(1, math.ceil(math.log2(1 + seen / stride)))


def _one_of(knob_name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"buzz: {knob_name} must be one of {allowed}, got {value!r}")
