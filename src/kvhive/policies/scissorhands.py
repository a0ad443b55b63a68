"""Scissorhands: what recent queries found unimportant stays unimportant."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import Needs, Observed
from kvhive.policies._parts import votes
from kvhive.policies._parts.endorsement import Rule, endorse
from kvhive.policies._parts.selection import keep_top, recent
from kvhive.policies.base import POLICIES, Policy, at_least, knob, one_of
from kvhive.slots import Column, Slots

MOST = 400  # queries remembered by default, and the width of the ring unless history= sets it
PAPER_ONLY = ("drop", "threshold")
PERCENTILE_ONLY = ("keep_fraction", "start", "decode")


@POLICIES.register("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Policy):
    """Drop, many at a time, the tokens that most of the recent queries found unimportant.

    A query that has seen t tokens finds a key unimportant if it gives it less than 1/t of its
    attention. Over budget, tokens are ranked by how many of the last `history` queries (of all
    query heads of the group) found them so; the worst go, except the `recent` newest, until
    `budget - drop + 1` are left. Ties, which are frequent: the older token goes.

    `variant="percentile"` is the code that was released: a key stays while a query of the last
    `history` counts it among its best tenth, and there is no budget; see
    `docs/methods/scissorhands.md`. With a budget it drops nothing below it, and then what was
    endorsed longest ago.
    Source: Liu et al. 2023, arXiv:2305.17118, algorithms 1 and 2. State: `history` bits per slot,
    times the binary digits of the group size; 4 bytes for the variant.
    """

    source: ClassVar[str] = "arXiv:2305.17118"
    cost: ClassVar[str] = (
        "the last 400 rows of a prompt, then each row; 50 bytes a slot (GQA of 4: 150)"
    )

    variant: Literal["paper", "percentile"] = knob(
        "paper", "the paper's policy, or the code that was released"
    )
    history: int | None = knob(
        None, "queries remembered; default min(400, 2 * budget), percentile: 100"
    )
    recent: int | None = knob(
        None, "newest tokens kept; default min(10, budget / 4), percentile: 10"
    )
    drop: int | None = knob(None, "tokens freed at a time, less one; default budget / 2")
    threshold: Literal["seen", "cache"] = knob(
        "seen", "an even share: 1 / tokens seen by the query, or 1 / keys it could see ('cache')"
    )
    keep_fraction: float = knob(0.1, "percentile: share of the row that a query endorses")
    start: int = knob(100, "percentile: first position that is pruned")
    decode: Literal["stream", "none"] = knob(
        "stream", "percentile: goes on while decoding, or for prompts alone"
    )

    def __post_init__(self) -> None:
        for name, least in (("history", 1), ("recent", 0), ("drop", 1), ("start", 0)):
            value = getattr(self, name)
            if value is not None:
                at_least("scissorhands", name, value, least)
        if not 0 < self.keep_fraction < 1:
            raise ValueError(
                f"scissorhands: keep_fraction must lie in (0, 1), got {self.keep_fraction}"
            )
        one_of("scissorhands", "variant", self.variant, ("paper", "percentile"))
        one_of("scissorhands", "threshold", self.threshold, ("seen", "cache"))
        one_of("scissorhands", "decode", self.decode, ("stream", "none"))
        other, foreign = (
            ("paper", PAPER_ONLY) if self.percentile else ("percentile", PERCENTILE_ONLY)
        )
        for field in fields(self):
            if field.name in foreign and getattr(self, field.name) != field.default:
                raise ValueError(f"scissorhands: {field.name} is for variant={other!r} only")

    @property
    def percentile(self) -> bool:
        """Whether this is the released code."""
        return self.variant == "percentile"

    @property
    def needs(self) -> Needs:
        """The rows of the last `history` queries; queries and keys for the released code."""
        if self.percentile:
            return Needs(queries=True, keys=True)
        return Needs(last_rows=self.history or MOST)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The votes (more bytes once the group size is known), or who endorsed the slot last."""
        if self.percentile:
            return {"endorsed": Column(torch.int32)}
        return {"low": Column(torch.uint8, (1, votes.ring_bytes(self.history or MOST)))}

    @property
    def least_budget(self) -> int:
        """Enough that more than the recent tokens is left after a drop."""
        if self.percentile:
            return self.rule.recent + 1
        if self.recent is None:
            return self.drop or 1
        return self.recent + self.drop if self.drop else max(1, 2 * self.recent - 1)

    @property
    def takes_own_size(self) -> bool:
        """The released code does."""
        return self.percentile

    @property
    def rule(self) -> Rule:
        """The released code's rule of visibility."""
        recent = 10 if self.recent is None else self.recent
        return Rule(self.history or 100, recent, self.start, self.keep_fraction)

    def own_limit(self, seen: int) -> int | None:
        """0, select and size yourself, from position `start` on."""
        return (seen if seen < self.start else 0) if self.percentile else None

    def slack(self, budget: int) -> int:
        """None: a drop frees many slots anyway."""
        return 0

    def acts(self, decoding: bool) -> bool:
        """Always, but for the released code kept to prompts."""
        return not (decoding and self.decode == "none")

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Remember what each of the last queries found unimportant: p < its even share."""
        if self.percentile:
            assert seen.queries is not None and seen.keys is not None
            rows = endorse(self.rule, slots, slots["endorsed"], seen.queries, seen.keys, seen.scale)
            deque(rows, maxlen=0)  # what each query saw does not matter here
            return
        assert seen.rows is not None
        number, history = seen.rows.shape[2], self.history or MOST
        grouped = votes.by_group(seen.rows, slots.heads)
        share = votes.average_share(slots, number, self.threshold)
        low = (grouped < share[:, :, None, :, None]).sum(2, dtype=torch.uint8)
        votes.hide_unseen(low, slots)
        planes, width = grouped.shape[2].bit_length(), votes.ring_bytes(history)
        slots.reshape("low", (planes, width))
        ring = slots["low"].view(*slots["low"].shape[:2], -1, width)  # each digit has its own
        place = torch.arange(planes, dtype=torch.uint8, device=low.device)
        digits = ((low[..., None] >> place) & 1).flatten(3)
        votes.record(ring, digits, votes.voters(slots, number), history)

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """Drop the worst of the older tokens down to `budget - drop + 1`."""
        if self.percentile:
            return self._endorsed(slots, budget)
        drop = torch.full_like(budget, self.drop) if self.drop else (budget // 2).clamp_min(1)
        stay = (budget - drop + 1).clamp_min(1)
        size = torch.full_like(budget, self.recent or 0)
        if self.recent is None:
            size = (budget // 4).clamp_max(10)
        size = torch.minimum(size, stay - 1)
        window = recent(slots, size)
        lows = self._lows(slots, budget)
        ranked = keep_top(-lows, slots.valid & ~window, stay - size, newer_first=True)
        return window | ranked

    def _lows(self, slots: Slots, budget: Tensor) -> Tensor:
        """int64 `[b, K, n]`: how often the remembered queries found each slot unimportant."""
        history = self.history or MOST
        rows = torch.full_like(budget, history)
        if self.history is None:
            rows = torch.minimum(rows, 2 * budget)
        newest = slots.position.amax(-1)
        planes = slots["low"].unbind(3)
        return sum(
            (votes.count(low, newest, rows, history) << plane for plane, low in enumerate(planes)),
            torch.zeros_like(budget)[..., None],
        )

    def _endorsed(self, slots: Slots, budget: Tensor) -> Tensor:
        """What the next query may see; what was endorsed last, if that is more than the budget."""
        position, endorsed = slots.position, slots["endorsed"]
        coming = position.amax(-1, keepdim=True) + 1
        stay = slots.valid & self.rule.visible(position, coming, endorsed)
        window = stay & recent(slots, self.rule.recent)
        room = torch.where(budget > 0, budget, slots.length) - window.sum(-1)
        return window | keep_top(endorsed, stay & ~window, room, newer_first=True)
