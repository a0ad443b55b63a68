"""A policy and its slots, driven as a layer drives them, with made-up attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.cache.eviction import cut
from kvhive.kernels import Held, Observed, Viewed
from kvhive.policies import Policy
from kvhive.slots import Slots
from kvhive.step import Step

NOTHING_TO_SCORE = Viewed(lambda: (torch.empty(0), torch.empty(0)))


def small_numbers(seed: int, *shape: int) -> Tensor:
    """float32 whole numbers from 0 to 4: sums are exact and ties abound."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def rows_of(position: Tensor) -> Step:
    """A step whose rows differ; position: int64 `[b, fresh]`, -1 for padding."""
    real = position >= 0
    return Step("prefill", position.shape[1], position, int(position.max()), real.sum(1), real)


def kept(policy: Policy, slots: Slots, budget: Tensor, held: Held = NOTHING_TO_SCORE) -> Tensor:
    """bool `[b, K, n]`: what a policy keeps of the slots; budget int64 `[b, K]`."""
    return policy.choose(slots, budget, policy.score(slots, held)).keep


class Rig:
    """Slots and a policy at work, without keys, values or kernel.

    received: float32 `[steps, heads, tokens]`, what each position would be given in each step.
    budget: for all heads; None lets the policy size itself.
    """

    def __init__(
        self, policy: Policy, budget: int | None, received: Tensor | None = None, heads: int = 1
    ) -> None:
        self.policy, self.budget, self.received = policy, budget, received
        self.heads = heads if received is None else received.shape[1]
        self.slots = Slots(1, self.heads, policy.columns, policy.counters, torch.device("cpu"))
        self.seen = self.steps = 0

    @property
    def limit(self) -> int:
        """Tokens a head may hold now."""
        if self.budget is not None:
            return self.budget
        alone = self.policy.sizing.alone
        assert alone is not None
        return alone(self.seen)

    @property
    def positions(self) -> list[list[int]]:
        """What every head holds, oldest first."""
        return [[p for p in head if p >= 0] for head in self.slots.position[0].tolist()]

    def step(self, fresh: int) -> None:
        """Append, observe, evict."""
        slots = self.slots
        slots.append(Step.plain(self.seen, fresh), slots.length + fresh)
        self.seen += fresh
        columns = None
        if self.received is not None and self.policy.needs.columns is not None:
            columns = self.received[self.steps][None].gather(2, slots.position.long())
        self.policy.observe(slots, Observed(fresh=fresh, columns=columns))
        self.steps += 1
        self.evict(self.limit)

    def evict(self, limit: int) -> None:
        """Cut heads above `limit` down to it."""
        limits = torch.full((1, self.heads), limit)
        plan = cut(self.policy, self.slots, NOTHING_TO_SCORE, limits, limits)
        if plan is not None:
            self.slots.adopt(plan)
            self.slots.compact(plan, plan.longest)

    def given(self, step: int, head: int) -> list[float]:
        """What a step gave each position in one head, for an oracle."""
        return [] if self.received is None else self.received[step, head].tolist()
