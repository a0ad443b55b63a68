"""H2O: the heavy hitters of all attention so far, and a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.kernels import TOGETHER, Held, Needs, Observed
from kvhive.policies._parts.selection import recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keep the tokens that received the most attention so far, and the most recent ones.

    score[j] is the attention key j received from every query since it arrived, summed over the
    query heads of its group, never decayed. Over budget, the best `budget - recent` of the older
    tokens stay beside the last `recent`. Ties go to the older token.
    Source: Zhang et al. 2023, arXiv:2306.14048, algorithm 1; `H2OKVCache_LayerWise` of the authors'
    code (tokens are really dropped). State: float32 score per slot.
    """

    source: ClassVar[str] = "arXiv:2306.14048"
    cost: ClassVar[str] = "column sums each step; 4 bytes a slot"

    recent: int | None = knob(None, "most recent tokens kept; default: half of the budget", least=0)

    @property
    def needs(self) -> Needs:
        """Column sums of every step."""
        return Needs(columns="sum", together=TOGETHER)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The accumulated score."""
        return {"score": Column()}

    @property
    def sizing(self) -> Sizing:
        """The window alone (no heavy hitter) is a budget too."""
        return Sizing(least=max(1, self.recent or 0))

    def observe(self, slots: Slots, seen: Observed) -> None:
        """score += this step's column sums."""
        assert seen.columns is not None
        slots["score"].add_(seen.columns)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """Attention received so far."""
        return slots["score"]

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The window."""
        return recent(slots, budget - budget // 2 if self.recent is None else self.recent)
