"""Run the probes of an item: each alone on one compressed context, or as turns of one talk."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvhive.evaluation.runner import Runner
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.sequences import Continuation, TokenScores
from kvhive.evaluation.types import CacheStats, Item, Outcome, Probe, RecipeResult
from kvhive.inference.modes import Mode
from kvhive.model.chat import ChatFormat, Part
from kvhive.recipe import Recipe

FULL = Recipe.parse("full")


@dataclass(frozen=True)
class ModelUnderTest:
    """How to ask: the runner, the chat form, the ids that end an answer, the recipes."""

    runner: Runner[Any]
    chat: ChatFormat
    ends: frozenset[int]
    recipes: tuple[Recipe, ...]

    def with_recipes(self, recipes: abc.Sequence[Recipe]) -> ModelUnderTest:
        """The same for other recipes."""
        return replace(self, recipes=tuple(recipes))

    def only_full(self) -> ModelUnderTest:
        """The same for the full cache alone."""
        return self.with_recipes([FULL])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.chat.tokenizer

    @property
    def model_runner(self) -> ModelRunner:
        """`runner`, for protocols that look into the model. Raises `ValueError` for an engine's."""
        if not isinstance(self.runner, ModelRunner):
            raise ValueError("an engine does not show what is inside it: use transformers")
        return self.runner

    def prefix(self, item: Item, part: Part) -> tuple[int, ...]:
        """Ids of the item's context (`part` is its prefix or its bare form), the user's turn left
        open.
        """
        return self.chat.opening(part) if item.chat else self.chat.ids(part)

    def query(self, item: Item, probe: Probe) -> tuple[int, ...]:
        """Ids of a question, up to where its answer begins."""
        if item.chat:
            return self.chat.question(probe.query, probe.cue)
        return (*self.chat.ids(probe.query), *self.chat.ids(probe.cue))

    def target(self, probe: Probe) -> tuple[int, ...]:
        """Ids of the target, empty when there is none."""
        return () if probe.target is None else self.chat.ids(probe.target)

    def reply(self, item: Item, probe: Probe) -> tuple[int, ...]:
        """Ids of the gold answer and what leads on to the user's next words."""
        return self.chat.ids(probe.history + (self.chat.turn if item.chat else "\n"))


def ask(
    tested: ModelUnderTest, item: Item, part: Part, mode: Mode, most: int
) -> list[RecipeResult]:
    """Every probe from the same compressed context; what a question adds is not kept.

    part: the item's prefix or its bare form. In mode "agnostic" the context is compressed alone; in
    mode "aware" together with the question, anew for each of the first `most` probes.
    """
    prefix = tested.prefix(item, part)
    if mode == "agnostic":
        return _from_one_prompt(tested, item, prefix)
    outcomes: list[list[Outcome]] = []
    starts: list[CacheStats] = []
    for probe in item.probes[:most]:
        sequences = tested.runner.read((*prefix, *tested.query(item, probe)), tested.recipes)
        starts = starts or [one.end for one in sequences]
        outcomes.append(_answer(tested, probe, sequences))
    return _results(sequences, starts, outcomes)


def _from_one_prompt(
    tested: ModelUnderTest, item: Item, prefix: tuple[int, ...]
) -> list[RecipeResult]:
    sequences = tested.runner.read(prefix, tested.recipes)
    starts = [one.end for one in sequences]
    only_targets = not any(probe.choices or probe.limit for probe in item.probes)
    way = _answer_together if only_targets else _answer_in_turn
    return _results(sequences, starts, way(tested, item, sequences))


def converse(
    tested: ModelUnderTest, item: Item, part: Part, mode: Mode, most: int
) -> list[RecipeResult]:
    """The probes as turns on one cache; the gold answers, not the model's own, become its history.

    In mode "aware" the first question is compressed together with the context, as in SCBench.
    """
    prefix, first = tested.prefix(item, part), tested.query(item, item.probes[0])
    ids = (*prefix, *first) if mode == "aware" else prefix
    sequences = tested.runner.read(ids, tested.recipes)
    starts = [one.end for one in sequences]
    if mode == "agnostic":
        tested.runner.advance(sequences, first)
    outcomes = []
    for place, probe in enumerate(item.probes):
        if place:
            before = item.probes[place - 1]
            turn = (*tested.reply(item, before), *tested.query(item, probe))
            tested.runner.advance(sequences, turn)
        outcomes.append(_answer(tested, probe, sequences))
    return _results(sequences, starts, outcomes)


def _answer(tested: ModelUnderTest, probe: Probe, sequences: abc.Sequence[Any]) -> list[Outcome]:
    """One probe, its question already fed; the sequences stay where they are."""
    target, choices = tested.target(probe), [tested.chat.ids(one) for one in probe.choices]
    wanted = [Continuation(ids) for ids in (target, *choices) if ids]
    scores = tested.runner.force(sequences, wanted) if wanted else [[] for _ in sequences]
    texts = _write(tested, probe, sequences)
    return [_outcome(one, bool(target), text) for one, text in zip(scores, texts, strict=True)]


def _answer_in_turn(
    tested: ModelUnderTest, item: Item, sequences: abc.Sequence[Any]
) -> list[list[Outcome]]:
    """All probes of an item, each from its own copy of the caches: `[probe][sequence]`."""
    outcomes = []
    for probe in item.probes:
        copies = [one.fork() for one in sequences]
        tested.runner.advance(copies, tested.query(item, probe))
        outcomes.append(_answer(tested, probe, copies))
    for sequence, copy in zip(sequences, copies, strict=True):
        sequence.end = copy.end
    return outcomes


def _answer_together(
    tested: ModelUnderTest, item: Item, sequences: abc.Sequence[Any]
) -> list[list[Outcome]]:
    """All probes of an item that has targets only, as rows of one batch: `[probe][sequence]`."""
    wanted = []
    for probe in item.probes:
        query = tested.query(item, probe)
        wanted.append(Continuation((*query, *tested.target(probe)), len(query)))
    scores = tested.runner.force(sequences, wanted)
    return [[_outcome([one[place]], True, None) for one in scores] for place in range(len(wanted))]


def _write(tested: ModelUnderTest, probe: Probe, sequences: abc.Sequence[Any]) -> list[str | None]:
    """Generated answers of copies of the sequences, cut before the probe's stop strings."""
    if not probe.limit:
        return [None] * len(sequences)
    copies = [one.fork() for one in sequences]
    done = _finished(tested, probe.stop)
    answers = tested.runner.generate(copies, probe.limit, done)
    for sequence, copy in zip(sequences, copies, strict=True):
        sequence.end = copy.end
    return [_text(tested, answer, probe.stop) for answer in answers]


def _finished(tested: ModelUnderTest, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
    def done(answer: list[int]) -> bool:
        if answer[-1] in tested.ends:
            return True
        text = _decoded(tested, answer).lstrip() if stop else ""
        return any(end in text for end in stop)

    return done


def _text(tested: ModelUnderTest, answer: list[int], stop: tuple[str, ...]) -> str:
    text = _decoded(tested, [token for token in answer if token not in tested.ends]).lstrip()
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=None)]


def _decoded(tested: ModelUnderTest, ids: list[int]) -> str:
    return str(tested.tokenizer.decode(ids, skip_special_tokens=True))


def _outcome(scores: abc.Sequence[TokenScores], has_target: bool, text: str | None) -> Outcome:
    target = scores[0] if has_target else TokenScores((), ())
    choices = tuple(sum(one.logprobs) for one in scores[1 if has_target else 0 :])
    return Outcome(target.logprobs, target.hits, choices, text)


def _results(
    sequences: abc.Sequence[Any], starts: list[CacheStats], outcomes: list[list[Outcome]]
) -> list[RecipeResult]:
    """outcomes: `[probe][sequence]`."""
    return [
        RecipeResult(one.recipe, of_one, start, one.end)
        for one, start, of_one in zip(sequences, starts, zip(*outcomes, strict=True), strict=True)
    ]
