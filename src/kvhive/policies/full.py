"""Full cache: keep everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Slots


@POLICIES.register("full")
@dataclass(frozen=True)
class Full(Policy):
    """Keep every token: the baseline all others are measured against, on the same code path.

    Source: Vaswani et al. 2017, arXiv:1706.03762. Grows by one slot a token.
    """

    source: ClassVar[str] = "arXiv:1706.03762"
    cost: ClassVar[str] = "memory and time a token grow with the tokens seen"

    @property
    def sizing(self) -> Sizing:
        """No budget, and no limit."""
        return Sizing(budgeted=False)

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """Everything."""
        return slots.valid
