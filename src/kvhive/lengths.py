"""How many tokens one sequence holds after each of its steps: a matter of lengths alone.

A serving engine frees blocks before any tensor of the next step exists. The policy itself tells it
how many, on slots of one head that nobody attends to; nothing of its arithmetic is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvhive.allocations.uniform import Uniform
from kvhive.cache.eviction import Eviction
from kvhive.cache.limits import Limits
from kvhive.kernels import Needs, Observed, Rows, Viewed
from kvhive.policies import Policy
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from kvhive.step import Step

HEADROOM = 256  # slots made room for ahead while decoding
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Event:
    """An eviction: heads that hold more than `target` tokens are cut down to it, and `kept` are
    left of each.
    """

    target: int
    kept: int


def policies_of(recipe: Recipe, layers: int) -> list[Policy]:
    """The policy of each layer.

    Raises `ValueError` for a recipe that lets heads or layers hold different numbers of tokens, or
    whose numbers depend on more than lengths.
    """
    policy = recipe.policy
    if not policy.even:
        raise ValueError(f"{policy.name} lets heads hold different numbers of tokens")
    if recipe.allocation != Uniform():
        even = replace(recipe, allocation=Uniform())
        raise ValueError(
            f"{recipe.allocation.name} lets heads or layers hold different numbers of tokens; "
            f"write {even}"
        )
    tokens = None if recipe.budget is None else recipe.budget.tokens
    policies = [policy.for_layer(layer, layers, tokens) for layer in range(layers)]
    other = next((place for place, one in enumerate(policies) if one.name != policy.name), None)
    if other is not None:
        raise ValueError(
            f"{policy} holds other numbers of tokens in layer {other} than elsewhere; leave no "
            "layer out"
        )
    return policies


class Lengths:
    """The lengths of one sequence, of which every head holds the same number of tokens.

    Raises `ValueError` for a recipe of which that is not so.
    """

    def __init__(self, recipe: Recipe) -> None:
        policy = policies_of(recipe, 1)[0]
        limits = Limits([policy], recipe.budget, recipe.allocation, recipe.slack)
        self._eviction = Eviction(policy, limits, 0)
        self._slots = Slots(1, 1, policy.columns, policy.counters, CPU)
        self.seen = 0
        self._unheard = 0  # decoded tokens of which the policy does not know yet

    @property
    def held(self) -> int:
        """Tokens that every head holds."""
        return self._slots.length

    @property
    def dropped(self) -> int:
        """Tokens that were read and are held no more."""
        return self.seen - self.held

    def step(self, seen: int) -> Event | None:
        """A step has ended with `seen` tokens read in all; the eviction that follows it, if any.

        A step of several tokens is a prompt, or another turn; one of a single token is decoding.
        Asked again about the same step, there is nothing more to do.
        """
        fresh = seen - self.seen
        if fresh == 0:
            return None
        step = Step.plain(self.seen, fresh)
        self._eviction.limits.follow(step, [seen], 1)
        self._append(step)
        if step.phase != "decode":
            self._eviction.forget()
        elif not self._eviction.decoding:
            return None
        if not self._eviction.due(self._slots, fresh):
            return None
        return self._evict(step.phase == "decode")

    def _append(self, step: Step) -> None:
        """Take the step's slots up; decoded tokens are heard of late where the policy allows it."""
        prompt = step.phase != "decode"
        if prompt or self._unheard >= self._eviction.policy.needs.together:
            self._hear()
        length = self._slots.length + step.fresh
        self._slots.append(step, max(self._slots.room, length + HEADROOM))
        self.seen += step.fresh
        self._unheard += step.fresh
        if prompt:
            self._hear()

    def _hear(self) -> None:
        policy, fresh = self._eviction.policy, self._unheard
        if fresh and policy.observes:
            policy.observe(self._slots, nothing_seen(policy.needs, fresh, self._slots.length))
        self._unheard = 0

    def _evict(self, decoding: bool) -> Event | None:
        self._hear()
        slots, limits = self._slots, self._eviction.limits
        limit = limits.target(0) if decoding else limits.of(0)
        plan = self._eviction.plan(slots, Viewed(partial(_alike, slots.length)), decoding)
        if plan is not None:
            slots.adopt(plan)
            slots.compact(plan, plan.longest + HEADROOM)
        return None if limit is None else Event(int(limit), slots.length)


def nothing_seen(needs: Needs, fresh: int, held: int) -> Observed:
    """What a model of one head that looks at nothing reports of `fresh` tokens, `held` in all."""
    none = torch.zeros(()).expand(1, 1, held)
    rows = min(needs.last_rows, fresh)
    return Observed(
        fresh,
        columns=none if needs.columns else None,
        rows=Rows.of(none[:, :, None].expand(1, 1, rows, held)) if rows else None,
        queries=torch.ones(()).expand(1, 1, fresh, 2) if needs.queries else None,
        keys=_alike(held)[0] if needs.keys else None,
    )


def _alike(held: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, 1, held, 2]` of which none stands out."""
    both = torch.ones(()).expand(1, 1, held, 2)
    return both, both
