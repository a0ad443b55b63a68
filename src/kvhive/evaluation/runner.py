"""What protocols ask of whatever runs the recipes: a model at hand, or an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from kvhive.evaluation.sequences import Continuation, TokenScores
from kvhive.evaluation.types import CacheStats
from kvhive.recipe import Recipe


@runtime_checkable
class Reading(Protocol):
    """One recipe after some text. end: what its cache held at last."""

    recipe: str
    end: CacheStats

    def fork(self: R) -> R:
        """An independent copy."""


R = TypeVar("R", bound=Reading)


@runtime_checkable
class Runner(Protocol[R]):
    """Recipes at work on token ids. What a runner cannot do it refuses with `ValueError`."""

    def read(self, ids: Sequence[int], recipes: Sequence[Recipe]) -> list[R]:
        """Every recipe after the prompt."""

    def advance(self, sequences: Sequence[R], ids: Sequence[int]) -> None:
        """Feed the same tokens to all, as decoding would."""

    def force(
        self, sequences: Sequence[R], continuations: Sequence[Continuation]
    ) -> list[list[TokenScores]]:
        """How likely each finds each continuation, `[sequence][continuation]`."""

    def generate(
        self, sequences: Sequence[R], limit: int, done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Greedy answers of at most `limit` tokens, which end when they are `done`."""
