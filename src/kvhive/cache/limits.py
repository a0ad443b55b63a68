"""How many tokens each head may hold: the budget, spread over heads, for every row of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvhive.budget import Budget
from kvhive.policies import Policy

Spread = Callable[[int, int], Tensor]


class Limits:
    """The limits of one layer, worked out again whenever its rows have read a prompt.

    policy, budget (None: the policy sizes itself), slack (None: the policy's own) as in `Recipe`.
    spread: (budget per head, KV heads) -> int64 `[kv_heads]`, this layer's part of the allocation.
    """

    def __init__(
        self, policy: Policy, budget: Budget | None, spread: Spread, slack: int | None
    ) -> None:
        self.policy, self.budget, self.slack = policy, budget, slack
        self._spread = spread
        self.rows: Tensor | None = None  # int64 [rows or 1, K]; None: nothing is limited
        self.least = self.most = 0  # of all heads and rows

    def reset(self) -> None:
        """Nothing is limited until `set`."""
        self.rows = None
        self.least = self.most = 0

    def set(self, seen: list[int], heads: int, device: torch.device) -> None:
        """Work the limits out for rows that have seen so many tokens (one entry: all alike)."""
        limits = [self._limit(tokens, heads) for tokens in seen]
        known = [limit for limit in limits if limit is not None]
        if len(known) < len(limits):
            self.rows = None
            return
        rows = torch.stack(known)
        self.rows = rows.to(device)
        self.least, self.most = int(rows.min()), int(rows.max())

    def _limit(self, seen: int, heads: int) -> Tensor | None:
        if self.budget is None:
            own = self.policy.own_limit(seen)
            return None if own is None else torch.full((heads,), own)
        if self.budget.share == 1:
            return None
        budget = self.policy.peak(self.budget.resolve(seen, self.policy.least_budget))
        return self._spread(budget, heads)

    def less(self, spare: int, batch: int, heads: int) -> Tensor:
        """int64 `[b, K]`: how many tokens each head may hold for `spare` more to fit."""
        assert self.rows is not None
        limits = self.rows
        if spare:
            least = (limits - spare).clamp_min(self.policy.least_budget - 1)  # always kept
            limits = torch.minimum(limits, least)
        return limits.expand(batch, heads)

    def with_slack(self, limits: Tensor) -> Tensor:
        """What to cut down to: each row frees by its own least limit, so that it does as it does
        alone.
        """
        least = limits.amin(-1, keepdim=True)
        if self.slack is None:
            free = [[self.policy.slack(limit)] for limit in least.flatten().tolist()]
            slack = torch.tensor(free, device=limits.device)
        else:
            slack = torch.full_like(least, self.slack)
        return torch.minimum(limits, (limits - slack).clamp_min(self.policy.least_budget))
