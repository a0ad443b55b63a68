"""What a policy is: a frozen dataclass that says which slots survive. Nothing else.

A policy sees slots and what attention reported, never a store, a model or a cache. All of it is
vectorised over batch and KV heads; there are no loops over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import NOTHING, Needs, Observed
from kvhive.registry import Registry
from kvhive.slots import Column, Slots

Positions = Literal["original", "cache"]


def knob(default: Any, meaning: str) -> Any:
    """A hyper-parameter with its default and what it means (shown by `kvhive recipes`)."""
    return field(default=default, metadata={"meaning": meaning})


def one_of(policy: str, knob: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ValueError`, naming all three, unless a policy's knob has an allowed value."""
    if value not in allowed:
        raise ValueError(f"{policy}: {knob} must be one of {allowed}, got {value!r}")


def at_least(policy: str, knob: str, value: int | float, least: int | float) -> None:
    """Raise `ValueError`, naming all three, unless a policy's knob is at least `least`."""
    if value < least:
        raise ValueError(f"{policy}: {knob} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Knob:
    """One hyper-parameter as the command line and the docs show it."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Policy:
    """Base of all policies. Fields are hyper-parameters, checked in `__post_init__` of the
    subclass.

    Class facts: `source` (paper), `positions` (the rotary rule of the method), `takes_budget`
    (False: the method sizes itself), `cost` (one line: time and extra memory), `scope` ("model":
    the survivors of all layers are chosen together by `select_all`, so a head may hold more than
    the budget as long as the heads of the model do not on average).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    positions: ClassVar[Positions] = "original"
    takes_budget: ClassVar[bool] = True
    scope: ClassVar[Literal["layer", "model"]] = "layer"

    @property
    def needs(self) -> Needs:
        """What must be observed of every step's attention."""
        return NOTHING

    @property
    def columns(self) -> Mapping[str, Column]:
        """Per-slot state that travels with the slot."""
        return {}

    @property
    def counters(self) -> Mapping[str, torch.dtype]:
        """Per-head state: one number for every row and KV head."""
        return {}

    @property
    def least_budget(self) -> int:
        """The smallest budget the hyper-parameters allow: what is always kept, and one more."""
        return 1

    @property
    def implied_budget(self) -> int | None:
        """The budget that the hyper-parameters fix by themselves, if they do."""
        return None

    @property
    def takes_own_size(self) -> bool:
        """Whether the method, as set, sizes itself and so can do without a budget."""
        return not self.takes_budget

    def own_limit(self, seen: int) -> int | None:
        """Without a budget: tokens a head may hold after `seen` before `select` is called.

        0: `select` is called after every step, its budget 0 too, and decides how many stay. None:
        nothing is limited.
        """
        return None

    def peak(self, budget: int) -> int:
        """The most tokens held for a nominal budget; the same, unless a knob says otherwise."""
        return budget

    def slack(self, budget: int) -> int:
        """Tokens to free beyond need when a decoding step goes over `budget`, so that the copying
        that
        an eviction costs is spread over that many steps. 0: exactly as the references do."""
        return min(64, budget // 32)

    @property
    def merges(self) -> bool:
        """Whether `merge_into` is asked: kept slots may then hold keys no token wrote."""
        return False

    def acts(self, decoding: bool) -> bool:
        """Whether the method evicts after such a step: methods for the prompt alone do not in
        decoding.
        """
        return True

    def for_layer(self, layer: int, layers: int) -> Policy:
        """The policy to use in layer `layer` of `layers`; most methods treat all alike."""
        return self

    def for_budget(self, tokens: int | None) -> Policy:
        """The policy to use at a budget of `tokens`, None for a share or none at all.

        For what depends on the recipe's budget and not on the one of the moment, which `make_room`
        lowers.
        """
        return self

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Fold a step's report into the slots' columns. Called once a step, after the slots were
        added.
        """

    def weigh(self, slots: Slots, held: Observed) -> None:
        """Score what is held, right before `select`: for scores that change with the others held.

        held: keys and values as attention reads them, where `needs` asks for them, and no attention
        (`fresh` is 0). Steps that evict nothing do not come here, so reading all keys costs little.
        """

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """Which slots stay: bool `[b, K, n]`, at most `budget` (int64 `[b, K]`) of each head's
        tokens.

        Reads slots and may update counters; heads that are within their budget are left alone by
        the cache whatever is said of them here.
        """
        raise TypeError(f"{type(self).__name__} does not say which slots survive")

    def select_all(
        self,
        slots: Sequence[Slots],
        limits: Sequence[Tensor],
        slack: int | None,
        decoding: bool,
    ) -> list[Tensor] | None:
        """With `scope = "model"`, in place of `select`: which slots of each layer stay.

        slots, limits (int64 `[b, K]`): one for each layer, in order. slack: tokens a head, on
        average, to free beyond need; None: the policy's own. Returns a bool `[b, K, n]` for each
        layer, or None when no row holds more than the sum of its limits. Rows are judged
        independently.
        """
        raise TypeError(f"{type(self).__name__} does not say which slots survive")

    def merge_into(self, slots: Slots, keep: Tensor) -> Tensor | None:
        """Into which kept slot each dropped one is folded, before the eviction that `keep`
        describes.

        int64 `[b, K, n]`, -1 where nothing is folded; None: nowhere at all. The store replaces the
        key and the value of each target by the plain mean of its own and all that are folded into
        it.
        """
        return None

    @classmethod
    def knobs(cls) -> list[Knob]:
        """The hyper-parameters with defaults and meaning."""
        return [Knob(f.name, f.default, f.metadata.get("meaning", "")) for f in fields(cls)]


POLICIES: Registry[Policy] = Registry("policy")
