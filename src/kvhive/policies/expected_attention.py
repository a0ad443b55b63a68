"""Expected attention: how much the queries to come will attend to a token, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts.futures import Gaussian, QueryRing, fit
from kvhive.policies._parts.selection import grouped, lengths, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Slots
from kvhive.spec import knob

HELD_AND_QUERIES = Needs(queries=True, score_keys=True, score_values=True)


@POLICIES.register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Keep the tokens that future queries are expected to draw most from.

    Queries, turned back to position 0, are taken to be Gaussian. Turned to each of the next
    `future` positions and averaged, that distribution gives E[exp(q k)] in closed form; normalised
    over the tokens held, averaged over the query heads of the group and multiplied by the length of
    the value (`+ epsilon` before), it is the score. The first `sink` tokens stay. Ties: the older
    token. The distribution is that of the prompt's queries; while decoding, of the last `queries`
    ones.

    Source: Devoto et al. 2025, arXiv:2510.00636; `ExpectedAttentionPress` of kvpress. State:
    the last `queries` queries of a layer.
    """

    source: ClassVar[str] = "arXiv:2510.00636"
    cost: ClassVar[str] = "reads keys and values once an eviction, O(n d^2); the last queries"

    sink: int = knob(
        4, "first tokens kept for ever; their queries are left out as outliers", least=0
    )
    future: int = knob(512, "positions ahead that are averaged over", least=1, most=2**16)
    covariance: bool = knob(True, "use the covariance of the queries, or their mean alone")
    epsilon: float = knob(
        0.0, "added to the expected attention before the value's length counts", least=0
    )
    queries: int = knob(
        128, "last queries that stand for those to come while decoding", least=1, most=2**12
    )
    decode: Literal["rescore", "none"] = knob(
        "rescore", "evict while decoding too, or compress prompts only"
    )

    @property
    def needs(self) -> Needs:
        """Queries of every step; keys and values when something must go."""
        return HELD_AND_QUERIES

    @property
    def sizing(self) -> Sizing:
        """The sinks and one more token; an eviction costs as much as many steps, so it frees an
        eighth of the budget, at most 128. Decoding evicts only with `decode="rescore"`.
        """
        return Sizing(
            least=self.sink + 1,
            slack=lambda budget: min(128, budget // 8),
            decoding=self.decode == "rescore",
        )

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Remember the last queries; of a step that brings as many, describe all."""
        assert seen.queries is not None
        ring = QueryRing(slots.state, seen.queries, self.queries)
        if seen.fresh == 1 and slots.last is not None and self.queries > 1:
            ring.add_one(slots.last, seen.queries)
            Gaussian.forget(slots.state)
            return
        position = slots.newest(seen.fresh)
        # Below padding there may be old slots: a query is real if its slot is newer than all known.
        real = ring.newer(position) if slots.holes else None
        ring.add(position, seen.queries, real)
        Gaussian.forget(slots.state)
        if seen.fresh < self.queries:
            return
        real = torch.ones_like(position, dtype=torch.bool) if real is None else real
        many = real.sum(1) >= self.queries
        if bool(many.any()):
            use = real & (position >= self.sink)
            whole = fit(seen.queries, position, use, seen.rotation, self.covariance)
            if not bool(many.all()):
                whole = whole.where(many, self._latest(ring, seen))
            whole.remember(slots.state)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """Expected attention times length of the value, for all tokens but the sinks."""
        state = slots.state
        now = Gaussian.recall(state) or self._latest(QueryRing(state), held)
        start = slots.position.amax((1, 2)) + 1
        coming = now.ahead(start, self.future, held.rotation)
        rest = slots.valid & ~sinks(slots, self.sink)
        logits = grouped(coming.log_expectation(held.keys, held.scale), slots.heads)
        share = logits.masked_fill(~rest[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        return (share.mean(2) + self.epsilon) * lengths(held.values)

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The sinks."""
        return sinks(slots, self.sink)

    def _latest(self, ring: QueryRing, seen: Observed | Held) -> Gaussian:
        position = ring.position
        use = position >= self.sink
        return fit(ring.queries, position, use, seen.rotation, self.covariance)
