"""How many tokens each head may hold: the budget, spread over layers and heads, for every row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvhive.allocations import Allocation, Facts
from kvhive.budget import Budget
from kvhive.calibration import Profile
from kvhive.policies import Policy
from kvhive.policies._parts.sizing import Sizing
from kvhive.step import Step

UNLIMITED = 1 << 62


class Limits:
    """The limits of all layers of a cache, worked out again whenever its rows have read a prompt.

    A share is taken of the tokens seen whenever a step brings several of them (a prompt, a chunk, a
    turn) and stays put in decoding; a stream that was fed single tokens from the start has no
    prompt, and its share follows the tokens seen.

    policies: of each layer. budget: None where they size themselves. slack: tokens to free beyond
    need when decoding goes over a limit; None: the policies' own. profile: for the allocation.
    best: the part of the tokens seen that the store holds better than the rest; None: it does not.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        budget: Budget | None,
        allocation: Allocation,
        slack: int | None,
        profile: Profile | None = None,
        best: float | None = None,
    ) -> None:
        self._best_share = best
        self.policies, self.budget = list(policies), budget
        self.allocation, self._slack, self._profile = allocation, slack, profile
        self.floor = max(sizing.least for sizing in self.sizings)
        if budget is not None:
            allocation.check(sum(sizing.budgeted for sizing in self.sizings))
        self.limited = budget is not None or any(s.alone is not None for s in self.sizings)
        self.reset()

    @cached_property
    def sizings(self) -> list[Sizing]:
        """Of each layer's policy."""
        return [policy.sizing for policy in self.policies]

    def __getstate__(self) -> dict[str, Any]:
        """Without the sizings, whose functions no pickle can hold."""
        return {name: value for name, value in vars(self).items() if name != "sizings"}

    def reset(self) -> None:
        """Nothing is limited until `follow`."""
        self.all: Tensor | None = None  # int64 [layers, rows or 1, K], on the CPU
        self.version = 0  # changes whenever `all` does
        self._best: Tensor | None = None  # of the best tokens, as `all`
        self._targets: dict[int, tuple[int, Tensor]] = {}  # of each layer, and their version
        self._prompted = False
        self._seen: list[int] = []

    def follow(self, step: Step, seen: list[int], heads: int) -> None:
        """Take notice of a step; seen: tokens each row has seen then, one entry if all alike."""
        self._prompted |= step.phase == "prefill"
        if not self.limited:
            return
        stays = self.budget is not None and step.phase != "prefill" and self._prompted
        if seen == self._seen or (stays and self.all is not None):
            return
        self._seen = seen
        rows = [self._limits(tokens, heads, self.budget) for tokens in seen]
        self.all, self.version = torch.stack(rows, 1), self.version + 1
        if self._best_share is not None:
            share = Budget(share=self._best_share)
            self._best = torch.stack([self._limits(tokens, heads, share) for tokens in seen], 1)

    @property
    def moving(self) -> bool:
        """Whether limits change with every token decoded."""
        return self.limited and (self.budget is None or not self._prompted)

    def of(self, layer: int) -> Tensor | None:
        """int64 `[rows or 1, K]` on the CPU; None while nothing is limited."""
        return None if self.all is None else self.all[layer]

    def best(self, layer: int) -> Tensor | None:
        """How many tokens the store holds best, as `of`; None: it makes no difference."""
        return None if self._best is None else self._best[layer]

    def target(self, layer: int) -> Tensor:
        """What decoding cuts a layer down to, int64 `[rows or 1, K]` on the CPU.

        Each row frees by its own mean limit, so that it does as it does alone, and none of its
        heads more than half of what it may hold.
        """
        version, target = self._targets.get(layer, (-1, None))
        if target is None or version != self.version:
            target = self._target(layer)
            self._targets[layer] = self.version, target
        return target

    def _target(self, layer: int) -> Tensor:
        limits, sizing = self.of(layer), self.sizings[layer]
        assert limits is not None
        if self._slack is None:
            means = limits.sum(-1) // limits.shape[-1]
            slack = torch.tensor([[sizing.slack(row)] for row in means.tolist()])
            slack = torch.minimum(slack, limits // 2)
        else:
            slack = torch.full_like(limits, self._slack)
        return torch.minimum(limits, (limits - slack).clamp_min(sizing.least))

    def lowered(self, layer: int, spare: int) -> Tensor:
        """Limits for `spare` more tokens to fit, as `of`; what the policy always keeps stays."""
        limits = self.of(layer)
        assert limits is not None
        if not spare:
            return limits
        least = (limits - spare).clamp_min(self.sizings[layer].least - 1)
        return torch.minimum(limits, least)

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        if self.all is not None and self.all.shape[1] > 1:
            self.all, self.version = self.all.index_select(1, rows.cpu()), self.version + 1
            if self._best is not None:
                self._best = self._best.index_select(1, rows.cpu())
            self._seen = []

    @property
    def nbytes(self) -> int:
        """Bytes of limits and targets."""
        held = [target for _, target in self._targets.values()]
        held += [one for one in (self.all, self._best) if one is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def _limits(self, seen: int, heads: int, budget: Budget | None) -> Tensor:
        """int64 `[layers, K]` for a row that has seen so many tokens."""
        limited = [self._sized(layer, seen, budget) for layer in range(len(self.policies))]
        budgets = [limit for limit in limited if limit is not None]
        if budget is None or not budgets:
            known = [UNLIMITED if limit is None else limit for limit in limited]
            return torch.tensor(known)[:, None].expand(-1, heads)
        places = tuple(place for place, limit in enumerate(limited) if limit is not None)
        facts = Facts(len(budgets), heads, seen, self._profile, places)
        shares = iter(self.allocation.shares(facts, budgets[0], self.floor))
        free = torch.full((heads,), UNLIMITED)
        return torch.stack([free if limit is None else next(shares) for limit in limited])

    def _sized(self, layer: int, seen: int, budget: Budget | None) -> int | None:
        """A layer's limit before allocation; None: it has none."""
        sizing = self.sizings[layer]
        if budget is None or not sizing.budgeted:
            return None if sizing.alone is None else sizing.alone(seen)
        if budget.share == 1:
            return None
        return sizing.peak(budget.resolve(seen, sizing.least))
