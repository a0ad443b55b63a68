"""A policy and its slots, driven with rows of attention over made-up logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import Observed, Rows
from kvhive.policies import Policy
from kvhive.step import Step

from .rig import Rig

BLOCK = 5  # rows handed over together


class RowRig(Rig):
    """Every step reports the probabilities of its last queries over the tokens held.

    logits: float32 `[query heads, tokens, tokens]`, of query and key positions. After each step
    `rows[head][query]` is a dict: the probability that the query gave each position.
    """

    def __init__(self, policy: Policy, budget: int | None, logits: Tensor, heads: int) -> None:
        super().__init__(policy, budget, heads=heads)
        self.logits = logits
        self.rows: list[dict[int, dict[int, float]]] = []

    def step(self, fresh: int) -> None:
        """Append, attend, observe, evict."""
        slots = self.slots
        slots.append(Step.plain(self.seen, fresh), slots.length + fresh)
        weights = self.attend(fresh)
        self.rows = [
            {
                self.seen + row: dict(zip(held, line, strict=True))
                for row, line in enumerate(head.tolist())
            }
            for held, head in zip(self.spread(slots.position[0]), weights[0], strict=True)
        ]
        self.seen += fresh
        last = weights[:, :, max(0, fresh - self.policy.needs.last_rows) :]
        self.policy.observe(slots, Observed(fresh=fresh, rows=in_blocks(last)))
        self.steps += 1
        self.evict(self.limit)

    def spread(self, position: Tensor) -> list[list[int]]:
        """Positions `[kv_heads, n]` for every query head."""
        group = self.logits.shape[0] // self.heads
        held: list[list[int]] = position.repeat_interleave(group, 0).tolist()
        return held

    def attend(self, fresh: int) -> Tensor:
        """float32 `[1, H, fresh, n]`: softmax over tokens held, and causally over the new ones."""
        position = (
            self.slots.position[0].long().repeat_interleave(self.logits.shape[0] // self.heads, 0)
        )
        query = torch.arange(self.seen, self.seen + fresh)
        held = position.clamp_min(0)[:, None].expand(-1, fresh, -1)
        logits = self.logits[:, query].gather(2, held)
        hidden = (position[:, None] < 0) | (position[:, None] > query[None, :, None])
        return logits.masked_fill(hidden, float("-inf")).softmax(-1)[None]


def in_blocks(rows: Tensor, size: int = BLOCK) -> Rows:
    """Rows of probabilities `[b, H, r, n]` as a kernel reports them: some at a time."""
    return Rows(rows.shape[2], lambda start, stop: rows[:, :, start:stop], size)


def random_logits(seed: int, heads: int, tokens: int, sharpness: float = 2.0) -> Tensor:
    """float32 `[heads, tokens, tokens]`, some keys liked by all queries."""
    source = torch.Generator().manual_seed(seed)
    liked = torch.randn(heads, 1, tokens, generator=source)
    return sharpness * (liked + torch.randn(heads, tokens, tokens, generator=source)) / 2**0.5


def random_steps(seed: int, tokens: int, longest: int) -> list[int]:
    """Step lengths that add up to `tokens`: mostly single tokens, some chunks, a prompt first."""
    source = torch.Generator().manual_seed(seed)
    steps = [int(torch.randint(1, longest + 1, (1,), generator=source))]
    while (left := tokens - sum(steps)) > 0:
        chunk = int(torch.randint(1, longest + 1, (1,), generator=source))
        single = bool(torch.rand(1, generator=source) < 0.8)
        steps.append(1 if single else min(chunk, left))
    return steps
