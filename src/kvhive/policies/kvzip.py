"""KVzip: keep what the model reads when it repeats the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvhive.kernels import Held, Observed
from kvhive.policies._parts.repetition import score_repeated
from kvhive.policies._parts.selection import sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy, Reconstruction
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """Keep the tokens that are attended to most when the model is made to repeat the context.

    What was read is fed once more in chunks of `chunk` tokens, behind "Repeat the previous context
    exactly." (later chunks: "Repeat the part of the previous context exactly, starting with" and
    the 8 tokens before). A token's score is the largest attention that any query of its chunk's
    pass, and of the query heads of its group, gives it; the softmax runs over that chunk, the first
    `sink` tokens and the pass itself. Heads compete across the model. The first `sink` tokens stay.
    Tokens that were never repeated come after all that were, the newest first. Ties: the older
    token. Prompts are compressed, decoding evicts nothing.

    Source: Kim et al. 2025, arXiv:2505.23416, and the authors' code. State: 2 bytes per slot.
    """

    source: ClassVar[str] = "arXiv:2505.23416"
    cost: ClassVar[str] = "reads a prompt again, some 7 prefills for a small model; 2 bytes a slot"
    allocation: ClassVar[str] = "global(floor=0.0)"

    sink: int = knob(4, "first tokens kept for ever", least=0)
    chunk: int = knob(2048, "tokens that are repeated at a time", least=1)

    @property
    def reconstruction(self) -> Reconstruction:
        """Chunk by chunk."""
        return Reconstruction(self.chunk)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The score."""
        return {"repeated": Column(torch.float16)}

    @property
    def sizing(self) -> Sizing:
        """The sinks and one more token; prompts alone are compressed."""
        return Sizing(least=self.sink + 1, decoding=False)

    def observe_reconstruction(self, slots: Slots, seen: Observed, repeated: Tensor) -> None:
        """Score the tokens of this chunk."""
        score_repeated(slots["repeated"], slots, seen, repeated, self.sink)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """The largest attention in the pass; minus its age for a token that was never repeated."""
        given, age = slots["repeated"], slots.count[..., None] - slots.rank
        return torch.where(given > 0, given, -age.float())

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The sinks."""
        return sinks(slots, self.sink)
