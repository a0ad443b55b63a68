"""StreamingLLM: attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.policies._parts.selection import recent, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy, Positions
from kvhive.slots import Slots
from kvhive.spec import knob


@POLICIES.register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first `sink` tokens and the last `budget - sink`, numbered by their place in the
    cache.

    The model puts much of its attention on the first tokens whatever they say; without them it
    breaks.
    Source: Xiao et al. 2023, arXiv:2309.17453, section 3. State: none.
    """

    source: ClassVar[str] = "arXiv:2309.17453"
    cost: ClassVar[str] = "no scores; any attention kernel"
    positions: ClassVar[Positions] = "cache"

    sink: int = knob(4, "first tokens kept for ever", least=0)

    @property
    def sizing(self) -> Sizing:
        """The sinks and one recent token."""
        return Sizing(least=self.sink + 1, outlasting=lambda held: min(held, self.sink))

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """Sinks and window."""
        return sinks(slots, self.sink) | recent(slots, budget - self.sink)
