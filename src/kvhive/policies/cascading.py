"""Cascading KV cache: sliding windows at growing strides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Needs, Observed
from kvhive.policies.base import POLICIES, Policy, Positions, knob
from kvhive.policies.cascade import insert
from kvhive.slots import Column, Slots

MOST_SINKS = 64


@POLICIES.register("cascading")
@dataclass(frozen=True)
class Cascading(Policy):
    """Split the window into levels, each moving half as often as the one before.

    Tokens that fall out of level i may enter level i + 1, which is open to them every
    `strides[i + 1]` steps only; in between, the better attended of two candidates has the place. The
    same memory as sinks and one window reaches back about (2^levels - 1) / levels times as far.
    Source: Willette et al. 2024, arXiv:2406.17808; the authors' kernel where the two differ. Ties: the
    later token. State: float32 score and a byte of level per slot, the number of sinks per head.

    A budget gives each level (budget - sink) / levels places, what is left over to the newest. Where
    more than one token is inserted at a time (prompts, chunks, and decoding with slack) they are
    inserted in order, by the scores of that moment.
    """

    source: ClassVar[str] = "arXiv:2406.17808"
    cost: ClassVar[str] = "column sums of each query head, each step; 5 bytes a slot"
    positions: ClassVar[Positions] = "cache"

    levels: int = knob(4, "windows")
    sink: int | None = knob(None, "first tokens kept for ever; default min(64, budget / 16)")
    places: int | None = knob(None, "tokens that each level holds; default: from the budget")
    strides: tuple[int, ...] | None = knob(
        None, "steps between moves, by level; default 1, 2, 4, ..."
    )
    beta: float = knob(0.9999, "what a score keeps from one query to the next")
    reduce: Literal["max", "mean", "median"] = knob(
        "max", "how the query heads that share a KV head make one score"
    )
    eager_fill: bool = knob(True, "all levels open until the cache is full")
    homogeneous: bool = knob(False, "one score, and so one selection, for all heads of a layer")

    def __post_init__(self) -> None:
        for name, least in (("levels", 1), ("sink", 0), ("places", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"cascading: {name} must be at least {least}, got {value}")
        if self.levels > 127:
            raise ValueError(f"cascading: levels must be at most 127, got {self.levels}")
        if self.strides is not None and (len(self.strides) != self.levels or min(self.strides) < 1):
            raise ValueError(
                f"cascading: strides must be {self.levels} numbers of at least 1, one a level, "
                f"got {list(self.strides)}"
            )
        if not 0 < self.beta < 1:
            raise ValueError(f"cascading: beta must lie in (0, 1), got {self.beta}")
        if self.reduce not in ("max", "mean", "median"):
            raise ValueError(
                f"cascading: reduce must be 'max', 'mean' or 'median', got {self.reduce!r}"
            )

    @property
    def needs(self) -> Needs:
        """Column sums of each query head, later queries weighing more."""
        return Needs(columns="sum", fold=False, decay=self.beta)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score, and 1 + level; 0 for sinks and for tokens not inserted yet."""
        return {"score": Column(), "level": Column(torch.uint8)}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """The number of sinks, settled when a head is first over its budget."""
        return {"sinks": torch.int16}

    @property
    def least_budget(self) -> int:
        """The sinks, and one token a level."""
        return self.levels + (1 if self.sink is None else self.sink)

    @property
    def implied_budget(self) -> int | None:
        """sink + levels * places; without eager fill tokens are dropped long before that."""
        return self._whole if self.eager_fill else None

    @property
    def takes_own_size(self) -> bool:
        """With `places` given."""
        return self._whole is not None

    def own_limit(self, seen: int) -> int | None:
        """0, select at every step, where `places` is given and levels do not fill eagerly."""
        return None if self._whole is None else 0

    def observe(self, slots: Slots, seen: Observed) -> None:
        """score = beta^q * score + (1 - beta) * this step's decayed column sums, of one or all heads."""
        assert seen.columns is not None
        heads = 1 if self.homogeneous else slots.heads
        grouped = seen.columns.unflatten(1, (heads, -1))
        received = {
            "max": lambda: grouped.amax(2),
            "mean": lambda: grouped.mean(2),
            "median": lambda: grouped.median(2).values,
        }[self.reduce]()
        queries = (slots.position[:, :1, -seen.fresh :] >= 0).sum(-1, keepdim=True)
        decay = (self.beta ** queries.double()).float()
        slots["score"].mul_(decay).add_(received, alpha=1 - self.beta)

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """Insert the tokens that came since, level by level; what is in none is dropped."""
        over = slots.count > budget
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
        slots["level"].copy_(torch.where(over[..., None], level + 1, slots["level"]))
        counter = slots.counters["sinks"]
        counter.copy_(torch.where(over, sinks.to(counter.dtype), counter))
        return kept | alive

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.strides or tuple(2**level for level in range(self.levels))

    @property
    def _whole(self) -> int | None:
        """The budget that given `places` add up to."""
        if self.places is None:
            return None
        room = self.levels * self.places
        return room + (min(MOST_SINKS, max(1, room // 16)) if self.sink is None else self.sink)

    def _regions(self, slots: Slots, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks int64 `[b, K]` and places in each level int64 `[levels, b, K]`.

        Sinks are settled once: a smaller budget (slack, or room made for a turn) shortens the levels.
        """
        if self._whole is not None:
            budget = torch.where(budget > 0, budget, self._whole).clamp_max(self._whole)
        settled = slots.counters["sinks"].long()
        if self.sink is None:
            whole = budget if self._whole is None else torch.full_like(budget, self._whole)
            usual = (whole // 16).clamp(1, MOST_SINKS)
        else:
            usual = torch.full_like(budget, self.sink)
        sinks = torch.where(settled > 0, settled, usual)
        sinks = torch.minimum(sinks, budget - self.levels)
        places = (budget - sinks) // self.levels
        sizes = places.expand(self.levels, *places.shape).clone()
        if self.places is None:
            sizes[0] += (budget - sinks) % self.levels
        return sinks, sizes
