"""Cascading KV cache: sliding windows at growing strides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import TOGETHER, Needs, Observed
from kvhive.policies._parts.cascade import insert
from kvhive.policies._parts.selection import new_tokens
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Choice, Policy, Positions
from kvhive.slots import Column, Slots
from kvhive.spec import knob

MOST_SINKS, MOST_LEVELS = 64, 32


@POLICIES.register("cascading")
@dataclass(frozen=True)
class Cascading(Policy):
    """Split the window into levels, each moving half as often as the one before.

    Tokens that fall out of level i may enter level i + 1, which is open to them every
    `strides[i + 1]` steps only; in between, the better attended of two candidates has the place.
    The same memory as sinks and one window reaches back about (2^levels - 1) / levels times as far.

    A budget gives each level (budget - sink) / levels places, and what is left over to the newest.
    Tokens that come at once (a prompt, a chunk, in decoding what slack lets gather: an eighth of
    the budget) are inserted in order, by the scores they have then.
    Source: Willette et al. 2024, arXiv:2406.17808; the authors' kernel where the two differ. Ties:
    the later token. State: float32 score and one byte per slot, the number of sinks per head.
    """

    source: ClassVar[str] = "arXiv:2406.17808"
    cost: ClassVar[str] = "column sums of each query head, each step; 5 bytes a slot"
    positions: ClassVar[Positions] = "cache"

    levels: int = knob(4, "windows", least=1, most=MOST_LEVELS)
    sink: int | None = knob(
        None, "first tokens kept for ever; default min(64, budget / 16)", least=0
    )
    places: int | None = knob(
        None, "tokens that each level holds; default: from the budget", least=1
    )
    strides: tuple[int, ...] | None = knob(
        None, "steps between moves, by level; default 1, 2, 4, ...", least=1
    )
    beta: float = knob(0.9999, "what a score keeps from one query to the next")
    reduce: Literal["max", "mean", "median"] = knob(
        "max", "how the query heads that share a KV head make one score"
    )
    eager_fill: bool = knob(True, "all levels open until the cache is full")
    homogeneous: bool = knob(False, "one score, and so one selection, for all heads of a layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strides is not None and len(self.strides) != self.levels:
            raise ValueError(
                f"cascading: strides must be {self.levels} numbers, one a level, "
                f"got {list(self.strides)}"
            )
        if not 0 < self.beta < 1:
            raise ValueError(f"cascading: beta must lie in (0, 1), got {self.beta}")

    @property
    def needs(self) -> Needs:
        """Column sums of each query head, later queries weighing more. Only means of a group may be
        taken of several queries at once.
        """
        together = TOGETHER if self.reduce == "mean" else 1
        return Needs(columns="sum", fold=False, decay=self.beta, together=together)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score, and 1 + level; 0 for sinks and for tokens not inserted yet."""
        return {"score": Column(), "level": Column(torch.uint8)}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """The number of sinks, settled when a head is first over its budget."""
        return {"sinks": torch.int32}

    @property
    def sizing(self) -> Sizing:
        """The sinks, and one token a level, at least.

        Where `places` is given the knobs add up to a budget of their own; without eager fill tokens
        are dropped long before that, at any step.
        """
        return Sizing(
            least=self.levels + (1 if self._given_sink is None else self._given_sink),
            implied=self._whole if self.eager_fill else None,
            alone=None if self._whole is None else lambda seen: 0,
            slack=lambda budget: min(256, budget // 8),
        )

    def observe(self, slots: Slots, seen: Observed) -> None:
        """score = beta^q * score + (1 - beta) * the step's column sums, weighed by beta^age."""
        assert seen.columns is not None
        heads = 1 if self.homogeneous else slots.heads
        grouped = seen.columns.view(len(seen.columns), heads, -1, slots.length)
        received = _reduced(grouped, self.reduce)
        decay: Tensor | float = self.beta**seen.fresh
        if slots.holes:
            decay = (self.beta ** new_tokens(slots, seen.fresh).double())[..., None].float()
        slots["score"].mul_(decay).add_(received, alpha=1 - self.beta)

    def choose(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Choice:
        """Insert the tokens that came since, level by level; what is in none is dropped."""
        sinks, sizes = self._regions(slots, budget)
        position = slots.position.long()
        level = slots["level"].long() - 1
        kept = slots.valid & (position < sinks[..., None])
        pending = slots.valid & ~kept & (level < 0)
        pending = pending & (position >= slots.counters["sinks"][..., None])
        eager = sizes.sum(0) if self.eager_fill else torch.full_like(sinks, -1)
        level, alive = insert(
            level, pending, position - sinks[..., None], slots["score"], sizes, self._strides, eager
        )
        return Choice(
            kept | alive,
            columns={"level": (level + 1).to(torch.uint8)},
            counters={"sinks": sinks.int()},
        )

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.strides or tuple(2**level for level in range(self.levels))

    @property
    def _given_sink(self) -> int | None:
        """The number of sinks where the knobs alone decide it; None where the budget does."""
        if self.sink is not None or self.places is None:
            return self.sink
        return min(MOST_SINKS, max(1, self.levels * self.places // 16))

    @property
    def _whole(self) -> int | None:
        """The budget that the knobs add up to, where `places` is given."""
        if self.places is None or self._given_sink is None:
            return None
        return self._given_sink + self.levels * self.places

    def _regions(self, slots: Slots, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks int64 `[b, K]` and places in each level int64 `[levels, b, K]`.

        Sinks are settled once: a smaller budget (slack, room made for a turn) shortens the levels.
        """
        if self._whole is not None:
            budget = torch.where(budget > 0, budget, self._whole).clamp_max(self._whole)
        sinks = (budget // 16).clamp(1, MOST_SINKS)
        if self._given_sink is not None:
            sinks = torch.full_like(budget, self._given_sink)
        settled = slots.counters["sinks"].long()
        sinks = torch.where(settled > 0, settled, sinks)
        sinks = torch.minimum(sinks, budget - self.levels)
        places = (budget - sinks) // self.levels
        sizes = places.expand(self.levels, *places.shape).clone()
        if self.places is None:
            sizes[0] += (budget - sinks) % self.levels
        return sinks, sizes


def _reduced(grouped: Tensor, how: Literal["max", "mean", "median"]) -> Tensor:
    """float32 `[b, K, G, n]` -> `[b, K, n]`; of an even number the median is the lower one."""
    if how == "max":
        return grouped.amax(2)
    return grouped.mean(2) if how == "mean" else grouped.median(2).values
