"""Random: the control that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvhive.kernels import Held
from kvhive.policies._parts.selection import recent, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Slots
from kvhive.spec import knob

LARGEST_SEED = 2**31 - 1
_MASK = 0xFFFFFFFF
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))


@POLICIES.register("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keep tokens drawn by lot, another draw for every layer and head: what choosing well is worth.

    A token's lot is a hash of its position, drawn once for ever, and the highest lots stay. So at
    every moment of a stream the survivors are a uniform sample of all the tokens seen (beside the
    sinks and the window, if any are asked for), and a text gives the same sample in any batch.

    Source: a control, no paper. State: none.
    """

    source: ClassVar[str] = "a control"
    cost: ClassVar[str] = "no scores; any attention kernel"

    seed: int = knob(0, "which draw", least=0, most=LARGEST_SEED)
    sink: int = knob(0, "first tokens kept for ever", least=0)
    recent: int = knob(0, "most recent tokens kept", least=0)

    @property
    def sizing(self) -> Sizing:
        """Sinks, window and one more token."""
        return Sizing(least=self.sink + self.recent + 1)

    def for_layer(self, layer: int, layers: int, tokens: int | None) -> Random:
        """A draw of its own."""
        return replace(self, seed=(self.seed + 1_000_003 * layer) % (LARGEST_SEED + 1))

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """Sinks and window."""
        return sinks(slots, self.sink) | recent(slots, self.recent)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """Lots: whole numbers below 2^24, a hash of seed, head and position."""
        head = torch.arange(slots.heads, device=slots.position.device)[:, None]
        draw = _scramble(_scramble(torch.full_like(head, self.seed)) + head)
        return (_scramble(draw + slots.position.long()) >> 8).float()


def _scramble(number: Tensor) -> Tensor:
    """Mix the low 32 bits of int64 numbers: an input bit flips each output bit half of the time."""
    number = number & _MASK
    for shift, factor in _STEPS:
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number
