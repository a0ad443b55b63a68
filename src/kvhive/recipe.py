"""Recipe: policy @ budget / allocation + store, as an object and as a string."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvhive.allocations import ALLOCATIONS, Allocation
from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.policies import POLICIES, Policy
from kvhive.policies.base import Positions
from kvhive.registry import Registry, did_you_mean
from kvhive.stores import STORES, StoreKind
from kvhive.stores.dense import Dense

_PART = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\))?\s*")
_SHARED_KNOBS = ("positions", "slack")


@dataclass(frozen=True)
class Recipe:
    """Which tokens survive, how many, and how they are held.

    policy: which. budget: how many a KV head may hold (`None` for methods that size themselves); a
    bare number or string is read as in the string form: 48 tokens, 0.4 of what was seen, "40%".
    allocation: how the budget is spread over layers and heads. store: how survivors lie in memory.
    positions: "original" (keys keep the rotary position they were written with) or "cache"
    (positions are counted inside the cache, so that none ever exceeds the budget); default: the
    policy's own rule.
    slack: tokens to free beyond need when decoding goes over budget; default: the policy's own.

    Raises `ValueError` with one sentence for any combination that cannot work, `TypeError` for a
    part that is not one.
    """

    policy: Policy
    budget: Budget | None = None
    allocation: Allocation = field(default_factory=Uniform)
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
        if self.positions not in (None, "original", "cache"):
            raise ValueError(f"positions must be 'original' or 'cache', got {self.positions!r}")
        if self.slack is not None and self.slack < 0:
            raise ValueError(f"slack must be at least 0, got {self.slack}")
        if self.slack and tokens is not None and self.slack > tokens - sizing.least:
            raise ValueError(
                f"slack {self.slack} leaves {name} fewer than its least of "
                f"{sizing.least} "
                f"tokens at a budget of {tokens}"
            )

    def _check_parts(self) -> None:
        kinds = (("policy", Policy), ("allocation", Allocation), ("store", StoreKind))
        for part, kind in kinds:
            value = getattr(self, part)
            if not isinstance(value, kind):
                raise TypeError(
                    f"recipe: {part} must be an instance of {kind.__name__}, got {value!r}; "
                    "Recipe.parse reads the string form"
                )
            hints = get_type_hints(type(value))
            for knob in fields(value):
                _check_knob(value.name, knob.name, getattr(value, knob.name), hints[knob.name])
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """From its string form, `policy(knob=value, ...)@budget/allocation+store`; only the policy
        must be.

        `positions=` and `slack=` are written among the policy's knobs:
        `buzz(stride=5, positions=original)@0.4`. Raises `ValueError` naming what is wrong,
        `TypeError` for anything but a string or a recipe.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            raise TypeError(f"recipe: expected a string such as 'buzz@0.4', got {text!r}")
        policy_part, rest = _take_part(text, text)
        budget: Budget | None = None
        allocation: Allocation = Uniform()
        store: StoreKind = Dense()
        if rest.startswith("@"):
            number = re.match(r"@([^/+]*)", rest)
            assert number is not None
            budget, rest = Budget.of(number.group(1)), rest[number.end() :]
        if rest.startswith("/"):
            part, rest = _take_part(rest[1:], text)
            allocation = _build(ALLOCATIONS, *part)
        if rest.startswith("+"):
            part, rest = _take_part(rest[1:], text)
            store = _build(STORES, *part)
        if rest:
            raise ValueError(
                f"recipe {text!r}: cannot read {rest!r}; the form is "
                "policy(knob=value)@budget/allocation+store"
            )
        name, knobs = policy_part
        shared = {knob: knobs.pop(knob) for knob in _SHARED_KNOBS if knob in knobs}
        hints = get_type_hints(cls)
        for knob, value in shared.items():
            _check_knob(name, knob, value, hints[knob])
        return cls(_build(POLICIES, name, knobs), budget, allocation, store, **shared)

    def __str__(self) -> str:
        shared = {k: getattr(self, k) for k in _SHARED_KNOBS if getattr(self, k) is not None}
        text = _print(self.policy, shared)
        if self.budget is not None and self.policy.sizing.implied is None:
            text += f"@{self.budget}"
        if self.allocation != Uniform():
            text += f"/{_print(self.allocation)}"
        return text if self.store == Dense() else f"{text}+{_print(self.store)}"


def _take_part(text: str, whole: str) -> tuple[tuple[str, dict[str, Any]], str]:
    """Read `name` or `name(knobs)` from the front; return it and what is left."""
    match = _PART.match(text)
    if match is None:
        raise ValueError(f"recipe {whole!r}: expected a name at {text!r}")
    name, inside = match.groups()
    knobs: dict[str, Any] = {}
    for piece in re.split(r",(?![^(\[]*[)\]])", inside or ""):
        if not piece.strip():
            continue
        knob, equals, value = piece.partition("=")
        if not equals:
            raise ValueError(f"recipe {whole!r}: write knobs as name=value, got {piece.strip()!r}")
        if knob.strip() in knobs:
            raise ValueError(f"recipe {whole!r}: {knob.strip()} is given twice")
        knobs[knob.strip()] = _value(value.strip())
    return (name, knobs), text[match.end() :]


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _build(registry: Registry[Any], name: str, knobs: dict[str, Any]) -> Any:
    cls = registry[name]
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for knob, value in knobs.items():
        if knob not in known:
            shared = list(_SHARED_KNOBS) if registry is POLICIES else []
            hint = did_you_mean(knob, known + shared) if known + shared else "it has none"
            raise ValueError(f"{name} has no knob {knob!r}; {hint}")
        if value is None and "none" in get_args(hints[knob]):
            value = knobs[knob] = "none"  # a word of its own here, as in decode=none
        _check_knob(name, knob, value, hints[knob])
    return cls(**knobs)


def _check_knob(name: str, knob: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ValueError(f"{name}: {knob} must be {_spell(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_spell(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if origin is tuple:
        return f"a list of {_spell(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _print(part: Any, extra: dict[str, Any] | None = None) -> str:
    knobs = {
        f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default
    }
    inside = ", ".join(f"{k}={_print_value(v)}" for k, v in (knobs | (extra or {})).items())
    return f"{part.name}({inside})" if inside else str(part.name)


def _print_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
