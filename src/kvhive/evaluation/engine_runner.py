"""Protocols against an engine that answers many questions at once: what they ask is noted down
first, and answered when they are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from transformers import PreTrainedModel

from kvhive.evaluation.engine import Question
from kvhive.evaluation.sequences import Continuation, TokenScores
from kvhive.evaluation.types import CacheStats
from kvhive.lengths import Lengths
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe

Done = Callable[[list[int]], bool]


@dataclass(eq=False)
class Prompted:
    """A prompt that a recipe is to read; what it then holds is known from lengths."""

    recipe: str
    prompt: tuple[int, ...]
    end: CacheStats

    def fork(self) -> Prompted:
        """A copy."""
        return Prompted(self.recipe, self.prompt, self.end)


class EngineRunner:
    """A `Runner` that writes answers, and nothing else.

    token_bytes: keys and values of one token. asked: recipe -> questions that came and had no
    answer; each was answered with nothing. answers: those there are.
    """

    def __init__(self, engine: str, token_bytes: int) -> None:
        self.engine, self.token_bytes = engine, token_bytes
        self.asked: dict[str, dict[Question, None]] = {}
        self.answers: dict[tuple[str, Question], list[int]] = {}

    def read(self, ids: Sequence[int], recipes: Sequence[Recipe]) -> list[Prompted]:
        """Every recipe after the prompt."""
        return [
            Prompted(str(recipe), tuple(ids), held(recipe, len(ids), 0, self.token_bytes))
            for recipe in recipes
        ]

    def generate(self, sequences: Sequence[Prompted], limit: int, done: Done) -> list[list[int]]:
        """The engine's answers, up to where they are done; empty where they are yet to come."""
        return [self._answer(one, limit, done) for one in sequences]

    def _answer(self, sequence: Prompted, limit: int, done: Done) -> list[int]:
        question = Question(sequence.prompt, limit)
        written = self.answers.get((sequence.recipe, question))
        if written is None:
            self.asked.setdefault(sequence.recipe, {})[question] = None
            return []
        stops = (size for size in range(1, len(written)) if done(written[:size]))
        answer = written[: next(stops, len(written))]
        recipe, fed = Recipe.parse(sequence.recipe), len(answer) - 1
        sequence.end = held(recipe, len(sequence.prompt), fed, self.token_bytes)
        return answer

    def advance(self, sequences: Sequence[Prompted], ids: Sequence[int]) -> NoReturn:
        """Raises `ValueError`: an engine reads prompts."""
        raise ValueError(
            f"{self.engine} compresses a prompt with all that follows it, so turns on one cache "
            "cannot be measured; ask the questions apart"
        )

    def force(
        self, sequences: Sequence[Prompted], continuations: Sequence[Continuation]
    ) -> list[list[TokenScores]]:
        """Raises `ValueError`: an engine scores none but its own tokens."""
        raise ValueError(
            f"{self.engine} tells no log probabilities of given answers; measure a task whose "
            "answers are only written: qa10_written, hotpotqa_written, niah_multivalue, "
            "niah_multiquery, cwe, fwe"
        )


def held(recipe: Recipe, prompt: int, decoded: int, token_bytes: int) -> CacheStats:
    """After a prompt of so many tokens and decoded ones: what every head holds, and the bytes of
    its keys and values alone.

    Raises `ValueError` for a recipe of which lengths do not tell.
    """
    lengths = Lengths(recipe)
    for seen in range(prompt, prompt + decoded + 1):
        lengths.step(seen)
    seen, kept = lengths.seen, lengths.held
    return CacheStats(seen, float(kept), kept * token_bytes, seen * token_bytes)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers.

    Raises `ValueError` for a model with layers that hold anything else.
    """
    outline = Outline.of(model, ())
    if len(outline.full_layers) < len(outline.shapes) + len(outline.fixed):
        raise ValueError(
            f"{outline.family} has layers that are no full attention, and what those hold in an "
            "engine is not known; use the engine transformers"
        )
    return sum(
        shape.kv_heads * (shape.key_width + shape.value_width) * shape.dtype.itemsize
        for shape in outline.shapes.values()
    )
