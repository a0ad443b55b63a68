"""Eviction: when a layer must give tokens up, and what stays. Limits and a policy make a plan.

When is known from lengths alone, without asking the device: `Slots.tally` and `Limits` are on the
CPU, and what is left before a limit is counted down from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvhive.cache.limits import Limits
from kvhive.kernels import Held
from kvhive.plan import Plan
from kvhive.policies import Choice, Policy
from kvhive.slots import Slots

ALWAYS_KEPT = float("inf")


@dataclass(eq=False)
class Eviction:
    """Keeps one layer within its limits. layer: its place among the compressed layers."""

    policy: Policy
    limits: Limits
    layer: int

    def __post_init__(self) -> None:
        self._spare: int | None = None  # tokens a head that may come before one may be over
        self._version = -1

    @property
    def together(self) -> bool:
        """Whether the layers are evicted from together, once the last of them has attended."""
        return self.policy.granularity == "model" or self.limits.allocation.compete == "model"

    @property
    def competing(self) -> bool:
        """Whether an allocation shares anew by scores; a layer without a limit takes no part."""
        budgeted = self.limits.sizings[self.layer].budgeted
        return budgeted and self.limits.allocation.compete != "none"

    @property
    def sharing(self) -> bool:
        """Whether heads share what they may hold, so that one of them has no limit of its own."""
        return self.together or self.competing

    @property
    def decoding(self) -> bool:
        """Whether decoding evicts at all."""
        return self.policy.sizing.decoding

    def forget(self) -> None:
        """What is held has changed otherwise than by decoding."""
        self._spare = None

    def due(self, slots: Slots, fresh: int) -> bool:
        """Whether something may have to go after a step of `fresh` tokens. Asks no device."""
        limits = self.limits.of(self.layer)
        if limits is None:
            return False
        if self.policy.granularity == "model":
            return True
        if self._spare is not None and self._version == self.limits.version:
            self._spare -= fresh
        elif self.together:  # the last layer counts for all of them, in `excess_together`
            return self.layer == len(self.limits.policies) - 1
        else:
            self.count_down(self._count(slots, limits))
        return self._spare is not None and self._spare < 0

    def count_down(self, spare: int) -> None:
        """Begin to count the tokens that each head may still be given."""
        self._spare, self._version = spare, self.limits.version

    def spares(self, slots: Slots) -> bool:
        """Whether all that is held is within limits that decoding does not move."""
        limits = self.limits.of(self.layer)
        if limits is None:
            return not self.limits.limited
        steady = not (self.limits.moving or self.together)
        return not self.decoding or (steady and self._count(slots, limits) >= 0)

    def _count(self, slots: Slots, limits: Tensor) -> int:
        left = limits - slots.tally
        if not self.competing:
            return int(left.min())
        return int(left.sum(-1).min() // slots.heads)

    def bound(self, growing: int) -> int | None:
        """The most slots a head needs room for, `growing` at a time; None: nobody knows."""
        limits = self.limits.of(self.layer)
        if limits is None or self.sharing or self.limits.budget is None or not self.decoding:
            return None
        return int(limits.max()) + growing

    def plan(self, slots: Slots, held: Held, decoding: bool, spare: int = 0) -> Plan | None:
        """What stays, with room for `spare` more tokens; None when nothing has to go."""
        self.forget()
        if slots.gaps:
            slots.recount()
        if self.limits.all is None:
            return None
        limits = target = self.limits.lowered(self.layer, spare).expand_as(slots.tally)
        if decoding:
            target = self.limits.target(self.layer).expand_as(slots.tally)
        best = self.limits.best(self.layer)
        best = None if best is None else best.expand_as(slots.tally)
        if not self.competing:
            return cut(self.policy, slots, held, limits, target, best=best)
        over = slots.tally.sum(-1, keepdim=True) > limits.sum(-1, keepdim=True)
        if not bool(over.any()):
            return None
        score = _scores_to_compete_by([self], [slots], [held])[0]
        on_device = [torch.where(over, target, limits).to(slots.device)]
        share = _shared([self], [slots], [score], on_device)[0]
        if best is not None:
            best = _shared([self], [slots], [score], [best.to(slots.device)])[0]
        return cut(self.policy, slots, held, share, share, score, best)

    def _ranked(self, slots: Slots, score: Tensor, budget: Tensor) -> Tensor:
        """Scores for heads to compete by; what stays anyway counts as won."""
        first = self.policy.protected(slots, budget)
        ranked = score.float().masked_fill(first, ALWAYS_KEPT)
        return ranked.masked_fill(~slots.valid, -ALWAYS_KEPT)


def excess_together(
    evictions: Sequence[Eviction], slots: Sequence[Slots], decoding: bool, spare: int = 0
) -> Tensor | None:
    """int64 `[b]` on the CPU: how much each row holds too much in all layers of a cache that are
    evicted from together; None: none does. Asks no device.
    """
    first = evictions[0]
    if first.limits.all is None:
        return None
    limits, target = _limits_together(evictions, slots, decoding, spare)
    if first.policy.granularity == "model":
        too_many = first.policy.excess(slots, limits, target)
    else:
        left = _left(evictions, slots, limits)
        heads = slots[0].heads * sum(eviction.competing for eviction in evictions)
        evictions[-1].count_down(int(left.min()) // heads)
        too_many = (-left).clamp_min(0)
    return too_many if bool(too_many.any()) else None


def plan_together(
    evictions: Sequence[Eviction],
    slots: Sequence[Slots],
    helds: Sequence[Held],
    decoding: bool,
    spare: int = 0,
) -> list[Plan | None]:
    """Plans for all layers of a cache that are evicted from together, in order."""
    for one in slots:
        if one.gaps:
            one.recount()
    too_many = excess_together(evictions, slots, decoding, spare)
    if too_many is None:
        return [None] * len(slots)
    policy = evictions[0].policy
    if policy.granularity == "model":
        keeps = policy.choose_all(slots, too_many, decoding)
        return [
            _plan(one, Choice(keep.to(one.device)), None)
            for one, keep in zip(slots, keeps, strict=True)
        ]
    limits, target = _limits_together(evictions, slots, decoding, spare)
    target = torch.where(too_many[:, None] > 0, target, limits)  # rows go down each on its own
    return _plan_by_scores(evictions, slots, helds, target)


def _limits_together(
    evictions: Sequence[Eviction], slots: Sequence[Slots], decoding: bool, spare: int
) -> tuple[Tensor, Tensor]:
    """Limits and targets of all layers, int64 `[layers, b, K]` on the CPU."""
    shared, size = evictions[0].limits, slots[0].tally.shape
    limits = [shared.lowered(place, spare).expand(size) for place in range(len(slots))]
    target = limits
    if decoding:
        target = [shared.target(place).expand(size) for place in range(len(slots))]
    return torch.stack(limits), torch.stack(target)


def _left(evictions: Sequence[Eviction], slots: Sequence[Slots], limits: Tensor) -> Tensor:
    """int64 `[b]` on the CPU: tokens that each row may still be given, below 0: holds too many."""
    part = [place for place, eviction in enumerate(evictions) if eviction.competing]
    tally = torch.stack([slots[place].tally for place in part])
    return limits[part].sum((0, 2)) - tally.sum((0, 2))


def _plan_by_scores(
    evictions: Sequence[Eviction], slots: Sequence[Slots], helds: Sequence[Held], target: Tensor
) -> list[Plan | None]:
    """The allocation shares `target` anew among all heads that compete, and each layer is cut to
    its part.
    """
    plans: list[Plan | None] = [None] * len(slots)
    part = [place for place, eviction in enumerate(evictions) if eviction.competing]
    scores = _scores_to_compete_by(
        [evictions[place] for place in part],
        [slots[place] for place in part],
        [helds[place] for place in part],
    )
    on_device = [target[place].to(slots[place].device) for place in part]
    ours, theirs = [evictions[place] for place in part], [slots[place] for place in part]
    bests = [one.limits.best(one.layer) for one in ours]
    shares = _shared(ours, theirs, scores, on_device)
    best: list[Tensor] | list[None] = [None] * len(part)
    if bests[0] is not None:
        wanted = [
            one.expand_as(share).to(held.device)
            for held, one, share in zip(theirs, bests, shares, strict=True)
            if one is not None
        ]
        best = _shared(ours, theirs, scores, wanted)
    for place, share, score, most in zip(part, shares, scores, best, strict=True):
        policy = evictions[place].policy
        plans[place] = cut(policy, slots[place], helds[place], share, share, score, most)
    return plans


def _shared(
    evictions: Sequence[Eviction],
    slots: Sequence[Slots],
    scores: Sequence[Tensor],
    budgets: list[Tensor],
) -> list[Tensor]:
    """int64 `[b, K]` of each layer on the CPU: budgets shared anew by the scores of tokens."""
    limits = evictions[0].limits
    ranked = [
        eviction._ranked(one, score, budget)
        for eviction, one, score, budget in zip(evictions, slots, scores, budgets, strict=True)
    ]
    return [share.cpu() for share in limits.allocation.at_eviction(ranked, budgets, limits.floor)]


def _scores_to_compete_by(
    evictions: Sequence[Eviction], slots: Sequence[Slots], helds: Sequence[Held]
) -> list[Tensor]:
    """float32 `[b, K, n]` of each layer. Raises `ValueError` for a policy that has no scores."""
    policies, scores = [eviction.policy for eviction in evictions], []
    for policy, one, score in zip(
        policies, slots, policies[0].score_all(policies, slots, helds), strict=True
    ):
        if score is None:
            raise ValueError(
                f"{evictions[0].limits.allocation.name} shares by the scores of tokens, and "
                f"{policy.name} has none; use a policy that scores, such as h2o or snapkv"
            )
        _check_shape(policy, "score", score, one)
        scores.append(score)
    return scores


def cut(
    policy: Policy,
    slots: Slots,
    held: Held,
    limits: Tensor,
    target: Tensor,
    score: Tensor | None = None,
    best: Tensor | None = None,
) -> Plan | None:
    """What a policy leaves: heads above their limit go down to the target, others stay as they are.

    Heads of a row whose limits differ go down together, or each would ask for an eviction in turn.

    limits, target: int64 `[b, K]` on the CPU. score: where it is known. best: int64 `[b, K]` on the
    CPU, how many of those that stay are the best; None: nobody asks. None when nothing goes.
    """
    over = slots.tally > limits
    if not bool(over.any()):
        return None
    differ = limits.amin(-1, keepdim=True) < limits.amax(-1, keepdim=True)
    over |= over.any(-1, keepdim=True) & differ & (slots.tally > target)
    budget = torch.where(over, target, limits).to(slots.device)
    if score is None:
        score = _score(policy, slots, held)
    choice = policy.choose(slots, budget, score)
    _check_shape(policy, "what stays", choice.keep, slots)
    if best is not None:
        most = torch.minimum(best.to(slots.device), budget)
        choice = replace(choice, best=policy.choose(slots, most, score).keep)
    return _plan(slots, choice, None if bool(over.all()) else over.to(slots.device))


def _score(policy: Policy, slots: Slots, held: Held) -> Tensor | None:
    score = policy.score(slots, held)
    if score is not None:
        _check_shape(policy, "score", score, slots)
    return score


def _check_shape(policy: Policy, what: str, given: Tensor, slots: Slots) -> None:
    """Raises `ValueError` for a policy that does not speak of every slot."""
    if given.shape != slots.valid.shape:
        raise ValueError(
            f"policy {policy.name}: {what} must be [b, K, n], here {tuple(slots.valid.shape)}, got "
            f"{tuple(given.shape)}"
        )


def _plan(slots: Slots, choice: Choice, over: Tensor | None) -> Plan | None:
    """The choice for the heads in `over` (bool `[b, K]`, None: all), the others left alone.

    None when nothing goes; what the policy knows may change nevertheless.
    """
    keep, into = choice.keep, choice.into
    columns, counters = dict(choice.columns), dict(choice.counters)
    if over is not None:
        keep = torch.where(over[..., None], keep, slots.valid)
        into = None if into is None else into.masked_fill(~over[..., None], -1)
        for name, column in columns.items():
            wide = over.view(*over.shape, *[1] * (column.dim() - 2))
            columns[name] = torch.where(wide, column, slots[name])
        for name, counter in counters.items():
            counters[name] = torch.where(over, counter, slots.counters[name])
    dropped = slots.valid & ~keep
    plan = Plan.keeping(keep, into, columns, counters, choice.best, dropped)
    if into is None and torch.equal(plan.tally, slots.tally):
        slots.adopt(plan)
        return None
    return plan
