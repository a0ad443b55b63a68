"""KV-Compress: all heads of all layers compete, and give up whole pages of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import Needs, Observed
from kvhive.policies._parts import pages
from kvhive.policies._parts.selection import grouped, new_tokens
from kvhive.policies._parts.sizing import Sizing, some_slack
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob


@POLICIES.register("kv_compress")
@dataclass(frozen=True)
class KVCompress(Policy):
    """Free the pages, of any layer and head, whose tokens received the least squared attention.

    The last `observed` queries of a prompt give each token the sum of their squared attention,
    max-pooled over its neighbours per query head and summed over the group; every later query adds
    its own, unpooled. Tokens are counted in pages of `page` tokens of one head. Over budget, the
    cheapest pages of the whole model go until the rest fit, so heads come to hold very different
    numbers of tokens: on average the budget, rounded up to whole pages.
    Ties: the newer token goes first; of pages the lower layer's, then the lower head's.
    Source: Rehg 2024, arXiv:2410.00161; the author's code. State: float32 metric per slot.
    """

    source: ClassVar[str] = "arXiv:2410.00161"
    cost: ClassVar[str] = (
        "last 32 rows of a prompt, then each row; a sort over all layers; 4 bytes a slot"
    )
    granularity: ClassVar[Literal["head", "layer", "model"]] = "model"

    observed: int = knob(32, "last queries of a prompt that vote", least=1)
    protected_window: int = knob(
        32, "newest tokens kept in every head, the coming one included", least=1
    )
    buffer: int = knob(0, "a query votes for tokens at least so far behind it", least=0)
    norm: Literal["l2", "l1"] = knob("l2", "a vote is squared attention, or attention")
    pool: int = knob(
        7, "width over which a prompt's votes are max-pooled; 1: not at all", most=1023
    )
    query_block: int = knob(4096, "observed queries pooled together; blocks are added up", least=1)
    page: int = knob(16, "tokens a page", least=1)
    sink: int = knob(0, "first tokens kept for ever", least=0)
    rate: float | None = knob(
        None, "in place of a budget: share kept of all tokens seen but the window; the cache grows"
    )
    decode: Literal["continual", "none"] = knob("continual", "evict while generating, or never")
    interval: int = knob(1, "generated tokens from one eviction to the next", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"kv_compress: pool must be an odd number, got {self.pool}")
        if self.buffer > self.protected_window:
            most = f"protected_window = {self.protected_window}"
            raise ValueError(f"kv_compress: buffer must be at most {most}, got {self.buffer}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"kv_compress: rate must lie in (0, 1], got {self.rate}")

    @property
    def needs(self) -> Needs:
        """The last rows."""
        return Needs(last_rows=self.observed)

    @property
    def columns(self) -> Mapping[str, Column]:
        """Votes received."""
        return {"metric": Column()}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """With an interval: tokens generated since the last prompt."""
        return {"generated": torch.int32} if self.interval > 1 else {}

    @property
    def sizing(self) -> Sizing:
        """Sinks and window at least, whole pages; with `rate` no budget."""
        return Sizing(
            least=self.sink + self.protected_window,
            budgeted=self.rate is None,
            alone=None if self.rate is None else self._limit,
            peak=self._whole,
            slack=self._slack,
            decoding=self.decode == "continual",
        )

    def _limit(self, seen: int) -> int:
        """With `rate`: the most a head holds on average, given that pages may be partly empty."""
        assert self.rate is not None
        window = self._whole(self.protected_window)
        return window + math.ceil(max(0, seen + 1 - window) * self.rate) + self.page - 1

    def _whole(self, budget: int) -> int:
        """Whole pages."""
        return -(-budget // self.page) * self.page

    def _slack(self, budget: int) -> int:
        """Whole pages, at least one; budgets below 8 pages have none to spare."""
        if budget < 8 * self.page:
            return 0
        return max(1, some_slack(budget) // self.page) * self.page

    def observe(self, slots: Slots, seen: Observed) -> None:
        """metric += votes; those of several tokens at once, a prompt's, are pooled."""
        assert seen.rows is not None
        pooled = None
        if seen.fresh > 1 or self.interval > 1:
            arrived = new_tokens(slots, seen.fresh)
            pooled = arrived[:, 0] > 1 if seen.fresh > 1 else None
            if self.interval > 1:
                generated = slots.counters["generated"]
                generated.add_(arrived == 1).masked_fill_(arrived > 1, 0)
        votes = self.votes(seen.rows.all(), slots, pooled)
        slots["metric"].add_(grouped(votes, slots.heads).sum(2))

    def votes(self, rows: Tensor, slots: Slots, pooled: Tensor | None) -> Tensor:
        """float32 `[b, H, n]`: what each query head gives, from probabilities `[b, H, r, n]`.

        The r queries are those of the last slots. pooled: bool `[b]`, for which rows of the batch
        votes are max-pooled; None: for none.
        """
        votes = rows.square() if self.norm == "l2" else rows
        first = slots.length - rows.shape[2]
        if self.buffer:
            position, group = slots.position, rows.shape[1] // slots.heads
            near = position[:, :, None, :] > position[:, :, first:, None] - self.buffer
            votes = votes.masked_fill(near.repeat_interleave(group, dim=1), 0.0)
        if rows.shape[2] > self.query_block:  # blocks are counted from a row's first query
            padding = ~slots.valid[:, 0, first:]
            order = padding.to(torch.uint8).sort(dim=-1, stable=True).indices
            votes = votes.gather(2, order[:, None, :, None].expand_as(votes))
        blocks = [block.sum(2) for block in torch.split(votes, self.query_block, dim=2)]
        plain = torch.stack(blocks).sum(0) if len(blocks) > 1 else blocks[0]
        if self.pool == 1 or pooled is None:
            return plain
        blocks = [self._smooth(block, slots) for block in blocks]
        return torch.where(pooled[:, None, None], torch.stack(blocks).sum(0), plain)

    def _smooth(self, votes: Tensor, slots: Slots) -> Tensor:
        """Max-pool `[b, H, n]` over neighbouring tokens, past padding that lies between them."""
        if not slots.holes:
            return F.max_pool1d(votes, self.pool, 1, self.pool // 2)
        order = slots.valid.to(torch.uint8).sort(dim=-1, stable=True).indices
        order = order.repeat_interleave(votes.shape[1] // slots.heads, dim=1)
        pooled = F.max_pool1d(votes.gather(-1, order), self.pool, 1, self.pool // 2)
        return torch.empty_like(votes).scatter_(-1, order, pooled)

    def choose_all(self, slots: Sequence[Slots], excess: Tensor, decoding: bool) -> list[Tensor]:
        """All but the cheapest pages, as many as are too many."""
        if decoding and self.interval > 1:
            excess = excess * (slots[0].counters["generated"][:, 0].cpu() % self.interval == 0)
        position, metric = pages.side_by_side(slots, "metric")
        coming = position.amax((1, 2))[:, None, None] + 1
        evictable = (position >= self.sink) & (position <= coming - self.protected_window)
        excess = excess.to(position.device)
        keep = pages.free(metric, position >= 0, evictable, excess, self.page)
        return pages.apart(keep, slots)

    def excess(self, slots: Sequence[Slots], limits: Tensor, target: Tensor) -> Tensor:
        """int64 `[b]` on the CPU: pages that each row is to give up; see the base."""
        count = torch.cat([held.tally for held in slots], 1)
        heads, taken = count.shape[1], pages.count_pages(count, self.page).sum(1)
        if self.rate is not None:
            window = self._whole(self.protected_window)
            older = _seen(slots) + 1 - window  # the coming token included
            wanted = ((older * heads).double() * self.rate).ceil().long() + window * heads
            surplus = (count.sum(1) - wanted).clamp_min(0)
            return torch.where(older > 0, pages.count_pages(surplus, self.page), 0)
        over = taken > limits.sum((0, 2)) // self.page
        return torch.where(over, taken - target.sum((0, 2)).clamp_min(0) // self.page, 0)


def _seen(slots: Sequence[Slots]) -> Tensor:
    """int64 `[b]` on the CPU: tokens each row has seen; heads may have dropped the newest."""
    if (last := slots[0].last) is not None:
        return torch.full((slots[0].batch,), last + 1)
    return torch.stack([held.position.amax((1, 2)).cpu() for held in slots]).amax(0).long() + 1
