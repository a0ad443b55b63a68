"""Scissorhands as released: a key stays while a recent query counts it among its best tenth."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Needs, Observed
from kvhive.policies._parts.endorsement import Rule, endorse
from kvhive.policies._parts.selection import keep_top, recent
from kvhive.policies._parts.sizing import Sizing, no_slack
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("scissorhands_percentile")
@dataclass(frozen=True)
class ScissorhandsPercentile(Policy):
    """Keep a key while one of the last `history` queries endorses it, and the `recent` newest.

    A query endorses the keys it gives more than its percentile; the paper's own rule is policy
    `scissorhands`. There is no budget; with one nothing is dropped below it, and then what was
    endorsed longest ago goes. Ties: the older token goes.
    Source: the code released for Liu et al. 2023, arXiv:2305.17118. State: int32 per slot.
    """

    source: ClassVar[str] = "arXiv:2305.17118"
    cost: ClassVar[str] = "walks a prompt query by query; 4 bytes a slot"

    history: int = knob(100, "queries remembered", least=1)
    recent: int = knob(10, "newest tokens kept", least=0)
    keep_fraction: float = knob(0.1, "share of the row that a query endorses")
    start: int = knob(100, "first position that is pruned", least=0)
    decode: Literal["stream", "none"] = knob("stream", "goes on while decoding, or prompts alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_fraction < 1:
            raise ValueError(
                "scissorhands_percentile: keep_fraction must lie in (0, 1), got "
                f"{self.keep_fraction}"
            )

    @property
    def needs(self) -> Needs:
        """Queries and keys."""
        return Needs(queries=True, keys=True)

    @property
    def columns(self) -> Mapping[str, Column]:
        """1 + position of the last query that endorsed the slot."""
        return {"endorsed": Column(torch.int32)}

    @property
    def sizing(self) -> Sizing:
        """It sizes itself, from position `start` on; a drop frees many slots anyway."""
        return Sizing(
            least=self.recent + 1,
            alone=lambda seen: seen if seen < self.start else 0,
            slack=no_slack,
            decoding=self.decode == "stream",
        )

    @property
    def rule(self) -> Rule:
        """Who is visible."""
        return Rule(self.history, self.recent, self.start, self.keep_fraction)

    @property
    def even(self) -> bool:
        """A head holds as many tokens as were endorsed."""
        return False

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Let the step's queries endorse."""
        assert seen.queries is not None and seen.keys is not None
        rows = endorse(self.rule, slots, slots["endorsed"], seen.queries, seen.keys, seen.scale)
        deque(rows, maxlen=0)  # what each query saw does not matter here

    def select(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Tensor:
        """What the next query may see; what was endorsed last, if that is more than the budget."""
        position, endorsed = slots.position, slots["endorsed"]
        coming = position.amax(-1, keepdim=True) + 1
        stay = slots.valid & self.rule.visible(position, coming, endorsed)
        window = stay & recent(slots, self.recent)
        room = torch.where(budget > 0, budget, slots.length) - window.sum(-1)
        return window | keep_top(endorsed, stay & ~window, room, newer_first=True)
