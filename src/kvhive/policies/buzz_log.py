"""BUZZ with a logarithmic history: cells are merged into cells of twice the span as they age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts import cells as hive
from kvhive.policies._parts import regions as region
from kvhive.policies._parts.regions import Regions, Sizes
from kvhive.policies._parts.sizing import Sizing, no_slack
from kvhive.policies.base import POLICIES, Choice, Policy, Positions
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("buzz_log")
@dataclass(frozen=True)
class BuzzLog(Policy):
    """Sinks, a window, and between them generations of cells, each cell twice as long as before.

    Every block of `stride` tokens that leave the window becomes a cell of the first generation, of
    which the best-attended token survives. A generation holds at most `cells` of them: beyond, its
    two oldest become one of the next, and the better token survives. So a history of n tokens takes
    O(log n) slots, evenly spread over the past on a logarithmic scale. At a fixed budget the oldest
    cells are merged into one when even that is too many.

    Source: ours, after Zhao et al. 2024, arXiv:2410.23079 (policy `buzz`); the bound and its proof
    are in `docs/methods/buzz_log.md`. Ties: the older token. State: float32 score per slot (not for
    `no_max`), one byte for the generation.
    """

    source: ClassVar[str] = "arXiv:2410.23079"
    cost: ClassVar[str] = "column sums (accum, fast) or none (no_max); 5 bytes a slot"
    positions: ClassVar[Positions] = "cache"

    variant: Literal["accum", "fast", "no_max"] = knob(
        "accum", "a cell's judge: attention since arrival, attention of this step, or none"
    )
    sink: int | None = knob(
        None, "first tokens kept for ever; default 4 (1 below a budget of 32)", least=0
    )
    window: int | None = knob(
        None, "most recent tokens kept; default 2/7 of budget - sink", least=1
    )
    threshold: int | None = knob(
        None, "history + fresh before an event, 2 * stride at least; default: the rest"
    )
    stride: int = knob(5, "fresh tokens to a cell", least=1)
    cells: int | None = knob(None, "cells a generation; default: from the budget", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 * self.stride
        if self.threshold is not None and self.threshold < least:
            raise ValueError(
                f"buzz_log: threshold must be at least 2 * stride = {least}, got {self.threshold}"
            )

    @property
    def needs(self) -> Needs:
        """Column sums, unless a cell's first token is taken."""
        return region.judged_by(self.variant)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score, and a cell's generation, 0 for what is not history."""
        score = {} if self.variant == "no_max" else {"score": Column()}
        return score | {"level": Column(torch.uint8)}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """The history's size, of each head."""
        return {"sample": torch.int32}

    @property
    def sizing(self) -> Sizing:
        """Sinks, window and two cells at least; with `cells` and `window` given it sizes itself,
        O(log n). An event frees many slots anyway.
        """
        sizes, implied = self._sizes, None
        if self.window is not None and self.threshold is not None:
            assert sizes.given_sink is not None
            implied = sizes.given_sink + self.window + self.threshold
        alone = None if self.cells is None or self.window is None else self._limit
        return Sizing(
            least=sizes.least(2 * self.stride),
            implied=implied,
            alone=alone,
            outlasting=sizes.outlasting,
            slack=no_slack,
        )

    def _limit(self, seen: int) -> int:
        """sink + window + cells * (stride + generations of `seen` tokens)."""
        sink = self._sizes.given_sink
        assert self.cells is not None and self.window is not None and sink is not None
        return sink + self.window + self.cells * (self.stride + generations(seen, self.stride))

    def for_layer(self, layer: int, layers: int, tokens: int | None) -> BuzzLog:
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
        """New cells, and merged ones, where a head is over its budget; see the class.

        A budget with no room for a cell leaves the sinks and the newest tokens.
        """
        regions, counter = self._sizes.regions(budget), slots.counters["sample"]
        over, bare = slots.count > budget, regions.room < self.stride
        keep, level = self._merge(slots, regions)
        sample = (keep & (level > 0)).sum(-1)
        keep, sample = hive.choose(
            over & bare, (regions.bare(slots), torch.zeros_like(budget)), (keep, sample)
        )
        level = level.masked_fill((over & bare)[..., None], 0)
        return Choice(
            keep,
            columns={"level": level.to(torch.uint8)},
            counters={"sample": sample.to(counter.dtype)},
        )

    @property
    def _sizes(self) -> Sizes:
        sized = self.threshold is not None or self.cells is not None
        return Sizes(self.sink, self.window, self.threshold, sized and self.window is not None)

    def _merge(self, slots: Slots, regions: Regions) -> tuple[Tensor, Tensor]:
        """Slots that stay and their generations."""
        score, held = region.scores(self.variant, slots), slots["level"].long()
        stay, level, loose = hive.close_cells(
            slots.valid, held, slots.counters["sample"].long(), score, regions, self.stride
        )
        stay, level = hive.fold_generations(stay, level, score, self._cells(slots, regions.room))
        most = (regions.room - loose).clamp_min(1)
        return hive.merge_oldest(stay, level, score, most)

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
