"""Recipe: policy @ budget / allocation + store, as an object and as a string."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from kvhive.allocations import ALLOCATIONS, Allocation
from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.named import unnamed
from kvhive.policies import POLICIES, Policy
from kvhive.policies.base import Positions
from kvhive.spec import Call, Knob, build, printed, take
from kvhive.stores import STORES, StoreKind
from kvhive.stores.dense import Dense

_SHARED = (  # knobs of the recipe that are written among its policy's
    Knob("positions", Positions | None, None),
    Knob("slack", int | None, None, least=0),
)


@dataclass(frozen=True)
class Recipe:
    """Which tokens survive, how many, and how they are held.

    policy: which. budget: how many a KV head may hold (`None` for methods that size themselves); a
    bare number or string is read as in the string form: 48 tokens, 0.4 of what was seen, "40%".
    allocation: how the budget is spread over layers and heads; default: the policy's own.
    store: how survivors lie in memory.
    positions: "original" (keys keep the rotary position they were written with) or "cache"
    (positions are counted inside the cache, so that none ever exceeds the budget); default: the
    policy's own rule.
    slack: tokens to free beyond need when decoding goes over budget; default: the policy's own.

    Raises `ValueError` with one sentence for any combination that cannot work, `TypeError` for a
    part that is not one.
    """

    policy: Policy
    budget: Budget | None = None
    allocation: Allocation = None  # type: ignore[assignment]  # until the policy's own is put there
    store: StoreKind = field(default_factory=Dense)
    positions: Positions | None = None
    slack: int | None = None

    def __post_init__(self) -> None:
        self._check_parts()
        name = self.policy.name
        sizing = self.policy.sizing
        if self.budget is None and sizing.implied is not None:
            object.__setattr__(self, "budget", Budget(tokens=sizing.implied))
        if self.budget is not None and not sizing.budgeted:
            raise ValueError(f"{name} takes no budget; leave @{self.budget} out")
        if self.budget is None and sizing.budgeted and sizing.alone is None:
            raise ValueError(f"{name} needs a budget: {name}@0.4 keeps 40 %, {name}@1024 tokens")
        tokens = None if self.budget is None else self.budget.tokens
        implied = sizing.implied
        if implied is not None and tokens != implied:
            raise ValueError(
                f"{name}: its knobs add up to a budget of {implied}, but @{self.budget} was asked "
                "for"
            )
        if tokens is not None and tokens < sizing.least:
            raise ValueError(
                f"{name}: a budget of {tokens} is below {sizing.least}, the least its "
                "sinks, window and one more token need; raise the budget or lower those knobs"
            )
        if self.slack and tokens is not None and self.slack > tokens - sizing.least:
            raise ValueError(
                f"slack {self.slack} leaves {name} fewer than its least of "
                f"{sizing.least} "
                f"tokens at a budget of {tokens}"
            )

        self._check_allocation()
        self._check_store()

    def _check_store(self) -> None:
        """Raises `ValueError` for a store that cannot hold what this policy leaves."""
        policy, store = self.policy, self.store
        one, other = self.allocation.calibration, store.calibration
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"{one} and {other} read a profile each, and a cache takes one: leave one of them "
                "out"
            )
        if not store.rewritable and policy.merges:
            raise ValueError(
                f"{policy.name} folds keys into others, and {store.name} cannot replace single "
                f"keys; use +rotated, or switch the folding of {policy.name} off"
            )
        if not store.rewritable and (self.positions or policy.position_rule) == "cache":
            raise ValueError(
                f"{policy.name} counts positions in the cache, so keys are turned, and "
                f"{store.name} cannot replace single keys; write "
                f"{policy.name}(positions=original), or use +rotated"
            )
        if store.best is None:
            return
        if self.budget is None or policy.granularity == "model":
            raise ValueError(
                f"{store.name} holds the best of what a budget leaves, and {policy.name} has no "
                "budget that could be smaller; use +kivi, or a policy with a budget"
            )
        share = self.budget.share
        if share is not None and store.best > share:
            raise ValueError(
                f"{store.name}: share={store.best:g} of the tokens cannot be the best of the "
                f"{share:g} that {policy.name} keeps; lower it, or raise the budget"
            )

    def _check_allocation(self) -> None:
        """Raises `ValueError` for an allocation that this policy leaves nothing to share out."""
        policy, allocation = self.policy.name, self.allocation.name
        if self.allocation == Uniform():
            return
        if self.budget is None:
            raise ValueError(
                f"{policy} has no budget here that {allocation} could share out; leave "
                f"/{allocation} out"
            )
        if self.policy.granularity == "model":
            raise ValueError(
                f"{policy} shares its budget out among all heads itself; leave /{allocation} out"
            )
        if self.allocation.compete != "none" and not self.policy.scores:
            raise ValueError(
                f"{allocation} shares by the scores of tokens, and {self.policy} has none; use a "
                "policy that scores, such as h2o or snapkv"
            )

    def _check_parts(self) -> None:
        if self.allocation is None and isinstance(self.policy, Policy):
            object.__setattr__(self, "allocation", _own_allocation(self.policy))
        kinds = (("policy", Policy), ("allocation", Allocation), ("store", StoreKind))
        for part, kind in kinds:
            value = getattr(self, part)
            if not isinstance(value, kind):
                raise TypeError(
                    f"recipe: {part} must be an instance of {kind.__name__}, got {value!r}; "
                    "Recipe.parse reads the string form"
                )
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))
        for knob in _SHARED:
            value = knob.check(self.policy.name, getattr(self, knob.name))
            object.__setattr__(self, knob.name, value)

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """From its string form, `policy(knob=value, ...)@budget/allocation+store`, of which only
        the policy must be, or from a name that stands for one (`kvhive.named`).

        `positions=` and `slack=` are written among the policy's knobs:
        `buzz(stride=5, positions=original)@0.4`. Raises `ValueError` naming what is wrong,
        `TypeError` for anything but a string or a recipe.
        """
        return text if isinstance(text, Recipe) else cls(**_parts(text))

    @classmethod
    def without_budget(cls, text: str | Recipe) -> Recipe:
        """A recipe whose budget is still to be found, "h2o": until then it keeps all, if its policy
        takes a budget. Raises as `parse`, and for a recipe that has a budget already.
        """
        if isinstance(text, Recipe):
            parts = {part.name: getattr(text, part.name) for part in fields(text)}
        else:
            parts = _parts(text)
        sizing, budget = parts["policy"].sizing, parts.get("budget")
        if sizing.implied is not None:
            raise ValueError(f"{text}: its knobs add up to a budget of {sizing.implied} already")
        if budget is not None:
            raise ValueError(f"{text} has a budget already: leave @{budget} out, or the size")
        return cls(**parts | ({"budget": Budget(share=1.0)} if sizing.budgeted else {}))

    def __str__(self) -> str:
        values = [(knob, getattr(self, knob.name)) for knob in _SHARED]
        shared = {knob.name: knob.spell(value) for knob, value in values if value is not None}
        text = printed(self.policy, shared)
        if self.budget is not None and self.policy.sizing.implied is None:
            text += f"@{self.budget}"
        if self.allocation != _own_allocation(self.policy):
            text += f"/{self.allocation}"
        return text if self.store == Dense() else f"{text}+{self.store}"


def _own_allocation(policy: Policy) -> Allocation:
    """The allocation that a policy asks for where none is written."""
    call, _ = take(policy.allocation, f"allocation of {policy.name}")
    return build(ALLOCATIONS, call)


def _policy_and_shared(front: Call) -> tuple[Policy, dict[str, Any]]:
    """The policy, and the recipe's own knobs that were written among its knobs."""
    shared = {knob.name: knob for knob in _SHARED}
    own = {name: text for name, text in front.knobs.items() if name not in shared}
    policy = build(POLICIES, Call(front.name, own), list(shared))
    given = front.knobs.keys() & shared.keys()
    return policy, {name: shared[name].read(front.name, front.knobs[name]) for name in given}


def _parts(text: str) -> dict[str, Any]:
    """The parts that a recipe's string names, by field."""
    if not isinstance(text, str):
        raise TypeError(f"recipe: expected a string such as 'buzz@0.4', got {text!r}")
    text = unnamed(text)
    what = f"recipe {text!r}"
    front, rest = take(text, what)
    policy, parts = _policy_and_shared(front)
    parts["policy"] = policy
    if rest.startswith("@"):
        number = re.match(r"@([^/+]*)", rest)
        assert number is not None
        parts["budget"], rest = Budget.of(number.group(1)), rest[number.end() :]
    if rest.startswith("/"):
        part, rest = take(rest[1:], what)
        parts["allocation"] = build(ALLOCATIONS, part)
    if rest.startswith("+"):
        part, rest = take(rest[1:], what)
        parts["store"] = build(STORES, part)
    if rest:
        raise ValueError(
            f"{what}: cannot read {rest!r}; the form is policy(knob=value)@budget/allocation+store"
        )
    return parts
