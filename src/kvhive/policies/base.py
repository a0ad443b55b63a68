"""What a policy is: a frozen dataclass that says which slots survive. Nothing else.

A policy sees slots and what attention reported, never a store, a model or a cache. All of it is
vectorised over batch and KV heads; there are no loops over tokens. Only `observe` writes, and only
into columns, counters and state of the slots; everything else is pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import NOTHING, Held, Needs, Observed
from kvhive.policies._parts.selection import keep_top
from kvhive.policies._parts.sizing import Sizing
from kvhive.registry import Registry
from kvhive.slots import Column, Slots
from kvhive.spec import Spec

Positions = Literal["original", "cache"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a policy decides at an eviction.

    keep: bool `[b, K, n]`, the slots that stay. into: int64 `[b, K, n]`, into which kept slot each
    dropped one is folded, -1 for none; None: nothing is. columns, counters: their new values, for
    those that an eviction changes (before the dropped slots go). best: bool as keep, what would
    stay of it at a smaller budget, where a store asks.
    """

    keep: Tensor
    into: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    best: Tensor | None = None


@dataclass(frozen=True)
class Reconstruction:
    """A second pass over what a step brought: it is fed once more, behind the words that ask the
    model to repeat it, and the policy observes what is read in doing so.

    chunk: tokens that are repeated at a time.
    """

    chunk: int


@dataclass(frozen=True)
class Policy(Spec):
    """Base of all policies. Fields are hyper-parameters.

    A method of its own needs one of these: `protected` alone (sinks and windows), `score` with or
    without `protected` (what is kept beside are the best), `select` (a mask), `choose` (a mask and
    what changes with it), `choose_all` (for all layers at once).

    Class facts: `source` (paper), `positions` (the rotary rule of the method), `cost` (one line:
    time and extra memory), `granularity` (who must agree on what stays: nobody beyond the KV
    "head", the heads of a "layer", or all layers of the "model", for which `choose_all` decides and
    the budget bounds the mean over all heads), `merges` (whether what is dropped is folded into
    what stays), `ties` (who wins among equal scores), `allocation` (how the method spreads a budget
    where the recipe does not say).
    """

    source: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    positions: ClassVar[Positions] = "original"
    granularity: ClassVar[Literal["head", "layer", "model"]] = "head"
    ties: ClassVar[Literal["older", "newer"]] = "older"
    allocation: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        """Raises `ValueError` for a class that does not say what stays, and as `Spec` does."""
        super().__post_init__()
        if self.sizing.budgeted and not any(_writes(type(self), name) for name in _CHOOSERS):
            raise ValueError(
                f"policy {self.name} says nothing of what stays: write score, protected, select or "
                "choose"
            )

    @property
    def position_rule(self) -> Positions:
        """The rotary rule with these hyper-parameters, where a recipe names none."""
        return self.positions

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
    def sizing(self) -> Sizing:
        """The sizes that the hyper-parameters ask for."""
        return Sizing()

    @property
    def scores(self) -> bool:
        """Whether `score` ranks tokens, so that heads can compete by it."""
        return _writes(type(self), "score")

    @property
    def merges(self) -> bool:
        """Whether `choose` folds slots into others, which then hold keys no token wrote."""
        return False

    @property
    def even(self) -> bool:
        """Whether lengths alone say how many tokens a head holds, the same in all heads: what
        engines can serve that have one length for a request (`kvhive.lengths`).
        """
        return self.granularity != "model"

    @property
    def observes(self) -> bool:
        """Whether the policy learns anything from a step."""
        return _writes(type(self), "observe")

    def for_layer(self, layer: int, layers: int, tokens: int | None) -> Policy:
        """The policy to use in layer `layer` of `layers`; most methods treat all alike.

        tokens: the recipe's budget where it is a count, None for a share or none at all. For what
        depends on it and not on the limit of the moment, which `make_room` lowers.
        """
        return self

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Fold a step's report into the slots' columns. Called once a step, after the slots were
        added. It must not ask the device for a number when one token a row was decoded.
        """

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The second pass that the method asks for; most ask for none."""
        return None

    def observe_reconstruction(self, slots: Slots, seen: Observed, repeated: Tensor) -> None:
        """Fold what a chunk of the second pass has read into the slots' columns.

        The last `seen.fresh` slots are those of the pass, which are taken back afterwards. seen:
        its queries, and the keys of all slots. repeated: bool `[b, K, n]`, the slots of the tokens
        that it repeats.
        """

    def score(self, slots: Slots, held: Held) -> Tensor | None:
        """What a token is worth, float32 `[b, K, n]`, the higher the better; None: the method does
        not rank tokens. held: keys and values, for methods that `needs` says read them.
        """
        return None

    @classmethod
    def score_all(
        cls, policies: Sequence[Policy], slots: Sequence[Slots], helds: Sequence[Held]
    ) -> list[Tensor | None]:
        """`score` of all layers, for heads that compete across the model; for methods by which a
        score depends on tokens of other layers. policies: of each layer, as `for_layer` made them.
        """
        parts = zip(policies, slots, helds, strict=True)
        return [policy.score(one, held) for policy, one, held in parts]

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """Tokens that stay whatever their score, bool `[b, K, n]`; budget as in `select`."""
        return torch.zeros_like(slots.valid)

    def select(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Tensor:
        """Which slots stay: bool `[b, K, n]`, at most `budget` (int64 `[b, K]`) of each head's
        tokens. By default those protected and the best of the rest.

        Heads that are within their limit are left alone whatever is said of them here.
        """
        first = self.protected(slots, budget)
        if score is None:
            return first
        room = budget - first.sum(-1)
        return first | keep_top(score, slots.valid & ~first, room, self.ties == "newer")

    def choose(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Choice:
        """As `select`, with all that changes with the eviction."""
        return Choice(self.select(slots, budget, score))

    def excess(self, slots: Sequence[Slots], limits: Tensor, target: Tensor) -> Tensor:
        """With granularity "model": how much each row is to give up, int64 `[b]` on the CPU, in
        whatever unit `choose_all` understands; from the `tally` of its slots, without asking the
        device.

        slots: of each layer, in order. limits, target: int64 `[layers, b, K]` on the CPU, what
        heads may hold, and what they are to be cut down to where they hold more.
        """
        raise TypeError(f"{type(self).__name__} does not say how many slots are too many")

    def choose_all(self, slots: Sequence[Slots], excess: Tensor, decoding: bool) -> list[Tensor]:
        """With granularity "model": which slots of each layer stay, a bool `[b, K, n]` for each.

        excess: what `excess` says. Rows are judged independently.
        """
        raise TypeError(f"{type(self).__name__} does not say which slots survive")


_CHOOSERS = ("score", "protected", "select", "choose", "choose_all")


def _writes(cls: type[Policy], name: str) -> bool:
    return getattr(cls, name) is not getattr(Policy, name)


POLICIES: Registry[Policy] = Registry("policy")
