"""Hive: two ranks of every token, by what the prompt's end reads and what its repetition reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import TOGETHER, Held, Needs, Observed
from kvhive.policies._parts.cells import neighbours, winners
from kvhive.policies._parts.fading import add_squares
from kvhive.policies._parts.ranking import shares_below
from kvhive.policies._parts.repetition import score_repeated
from kvhive.policies._parts.selection import recent, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy, Reconstruction
from kvhive.slots import Column, Slots
from kvhive.spec import knob

FIRST = 1.0  # added to the score of a cell's best: no rank is higher


@POLICIES.register("hive")
@dataclass(frozen=True)
class Hive(Policy):
    """Keep the tokens with the best mean of two ranks, each taken over all tokens of all heads.

    (a) Squared attention of the last `observed` queries, summed over the query heads of a group and
    pooled by a maximum over `pool` tokens. (b) The largest attention that any query of a
    reconstruction pass gives the token, as in `kvzip`: the context is fed once more, `chunk` tokens
    at a time, behind the words that ask for a repetition. A token that was never repeated, as one
    that was decoded, ranks by (a) alone. Heads compete across the model; where they do not, ranks
    are those within a layer. The first `sink` tokens and the last `window` stay. Ties: the older.

    While decoding (a) follows the newest queries: a query counts `1 - 1 / observed` times the next.

    Source: ours; (b) is Kim et al. 2025, arXiv:2505.23416. State: 6 bytes per slot.
    """

    source: ClassVar[str] = "ours"
    cost: ClassVar[str] = "reads a prompt again, some 4 prefills for a small model; 6 bytes a slot"
    allocation: ClassVar[str] = "global"

    sink: int = knob(4, "first tokens kept for ever", least=0)
    window: int = knob(32, "last tokens, always kept", least=1)
    observed: int = knob(128, "last queries whose attention counts", least=1, most=2**12)
    pool: int = knob(7, "tokens that it is pooled over, an odd number", least=1, most=1023)
    reconstruct: bool = knob(True, "feed the context a second time, or rank by (a) alone")
    weight: float = knob(
        0.3,
        "of rank (a) in the mean: less keeps single facts, more what the end looks at",
        least=0,
        most=1,
    )
    chunk: int = knob(1024, "tokens that are repeated at a time", least=1)
    cell: int = knob(
        0,
        "neighbouring tokens of which the best comes before all that are no cell's best; 0: off",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise ValueError(f"hive: pool must be an odd number, got {self.pool}")

    @property
    def needs(self) -> Needs:
        """The last queries' rows of probabilities."""
        return Needs(last_rows=self.observed, together=TOGETHER)

    @property
    def reconstruction(self) -> Reconstruction | None:
        """Chunk by chunk, unless it is switched off."""
        return Reconstruction(self.chunk) if self.reconstruct else None

    @property
    def columns(self) -> Mapping[str, Column]:
        """(a) before it is pooled, and (b)."""
        votes = {"votes": Column()}
        return {**votes, "repeated": Column(torch.float16)} if self.reconstruct else votes

    @property
    def sizing(self) -> Sizing:
        """What always stays, and one more."""
        return Sizing(least=self.sink + self.window + 1)

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Add the squares of what the last queries gave."""
        assert seen.rows is not None
        add_squares(slots["votes"], slots, seen.rows, self.observed)

    def observe_reconstruction(self, slots: Slots, seen: Observed, repeated: Tensor) -> None:
        """Score the tokens of this chunk."""
        score_repeated(slots["repeated"], slots, seen, repeated, self.sink)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """The mean of the two ranks within the layer."""
        return ranked([self], [slots])[0]

    @classmethod
    def score_all(
        cls, policies: Sequence[Policy], slots: Sequence[Slots], helds: Sequence[Held]
    ) -> list[Tensor | None]:
        """The mean of the two ranks within the model."""
        return list(ranked(cast("Sequence[Hive]", policies), slots))

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The sinks and the window."""
        return sinks(slots, self.sink) | recent(slots, (budget - self.sink).clamp(0, self.window))

    def pooled(self, slots: Slots) -> Tensor:
        """(a) of every slot."""
        votes = slots["votes"].masked_fill(~slots.valid, 0.0)  # as there are none beyond the ends
        pooled: Tensor = F.max_pool1d(votes, self.pool, stride=1, padding=self.pool // 2)
        return pooled


def ranked(policies: Sequence[Hive], slots: Sequence[Slots]) -> list[Tensor]:
    """float32 `[b, K, n]` for each layer: what its tokens are worth among those of all of them."""
    valid = [one.valid for one in slots]
    votes = [policy.pooled(one) for policy, one in zip(policies, slots, strict=True)]
    score = shares_below(votes, valid)
    weight = policies[0].weight
    if policies[0].reconstruct:
        given = [one["repeated"] for one in slots]
        known = [(one > 0) & real for one, real in zip(given, valid, strict=True)]
        again = shares_below(given, known)
        score = [
            torch.where(one, weight * a + (1 - weight) * b, a)
            for one, a, b in zip(known, score, again, strict=True)
        ]
    if (cell := policies[0].cell) == 0:
        return score
    return [
        one + FIRST * winners(neighbours(held, cell), real, one)
        for held, real, one in zip(slots, valid, score, strict=True)
    ]
