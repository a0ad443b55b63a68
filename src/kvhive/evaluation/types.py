"""What a task asks, and what a recipe answered: plain values, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvhive.model.chat import Part


@dataclass(frozen=True)
class Probe:
    """One question about a context.

    query: what follows the context. cue: how the answer begins; it is given, not scored. target:
    the answer whose every token is scored with the tokens before it given. choices: answers of
    which the likeliest is taken; gold: the index of the right one. references: accepted texts of a
    generated answer of at most `limit` tokens (0: nothing is generated), which ends early before
    any of `stop`. history: what a conversation holds as the answer afterwards.
    """

    query: Part
    cue: str = ""
    target: Part | None = None
    choices: tuple[str, ...] = ()
    gold: int = 0
    references: tuple[str, ...] = ()
    limit: int = 0
    stop: tuple[str, ...] = ()
    history: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A context and the questions asked of it.

    prefix: everything before the first question; what is compressed. bare: the same without what
    the questions are about, for the floor. chat: whether prefix and query are a user's turn.
    cluster: items that share it (one question in three places, say) are resampled together. facts:
    carried to every row.
    """

    id: str
    prefix: Part
    bare: Part
    probes: tuple[Probe, ...]
    chat: bool = True
    cluster: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one recipe made of one probe.

    logprobs: natural log probability of every target token; hits: whether it was the likeliest.
    choices: summed log probability of every choice. text: what was generated, None if nothing was.
    values: quantities that a task measures itself.
    """

    logprobs: tuple[float, ...] = ()
    hits: tuple[bool, ...] = ()
    choices: tuple[float, ...] = ()
    text: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheStats:
    """What a cache held at one moment, for one row: tokens seen and kept (mean of heads), bytes."""

    seen: int
    kept: float
    nbytes: int
    full_nbytes: int


@dataclass(frozen=True)
class RecipeResult:
    """One recipe on one item. start: at the first decoded token; end: at the last."""

    recipe: str
    outcomes: tuple[Outcome, ...]
    start: CacheStats
    end: CacheStats


@dataclass(frozen=True)
class MeasureInput:
    """All that a measure may look at: one recipe's outcomes, the full cache's, and the floor's."""

    item: Item
    outcomes: tuple[Outcome, ...]
    full: tuple[Outcome, ...]
    none: tuple[Outcome, ...] | None

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The probes that were run; a mode may run the first few only."""
        return self.item.probes[: len(self.outcomes)]
