"""Local window: the most recent tokens, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.policies._parts.selection import recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy, Positions
from kvhive.slots import Slots


@POLICIES.register("window")
@dataclass(frozen=True)
class Window(Policy):
    """Keep the last `budget` tokens. The weakest baseline: it breaks as soon as the first token
    goes.

    Source: Xiao et al. 2023, arXiv:2309.17453, section 2 ("window attention"). State: none.
    """

    source: ClassVar[str] = "arXiv:2309.17453"
    cost: ClassVar[str] = "no scores; any attention kernel"
    positions: ClassVar[Positions] = "cache"

    @property
    def sizing(self) -> Sizing:
        """What is dropped is older than all that stays."""
        return Sizing(outlasting=lambda held: 0)

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The last `budget` tokens of each head."""
        return recent(slots, budget)
