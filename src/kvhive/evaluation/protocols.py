"""Run the probes of an item: each alone on one compressed context, or as turns of one talk."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from kvhive.evaluation.framing import ChatFormat
from kvhive.evaluation.scoring import Continuation, ModelRunner, Sequence, TokenScores, held
from kvhive.evaluation.types import CacheStats, Item, Outcome, Part, Probe, RecipeResult
from kvhive.recipe import Recipe

Mode = Literal["agnostic", "aware", "stream"]
FULL = Recipe.parse("full")


@dataclass(frozen=True)
class ModelUnderTest:
    """How to ask: the stage, the chat form, the ids that end an answer, the recipes."""

    stage: ModelRunner
    frame: ChatFormat
    ends: frozenset[int]
    recipes: tuple[Recipe, ...]

    def with_recipes(self, recipes: abc.Sequence[Recipe]) -> ModelUnderTest:
        """The same for other recipes."""
        return ModelUnderTest(self.stage, self.frame, self.ends, tuple(recipes))

    def only_full(self) -> ModelUnderTest:
        """The same for the full cache alone."""
        return self.with_recipes([FULL])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.frame.tokenizer


def ask(
    asked: ModelUnderTest, item: Item, context: Part, mode: Mode, most: int
) -> list[RecipeResult]:
    """Every probe from the same compressed context; what a question adds is not kept.

    context: the item's prefix or its bare form. In mode "agnostic" the context is compressed alone;
    in mode "aware" together with the question, anew for each of the first `most` probes.
    """
    prefix = asked.frame.prefix(item, context)
    if mode == "agnostic":
        return _from_one_prompt(asked, item, prefix)
    told: list[list[Outcome]] = [[] for _ in asked.recipes]
    starts: list[CacheStats] = []
    for probe in item.probes[:most]:
        voices = asked.stage.read((*prefix, *asked.frame.query(item, probe)), asked.recipes)
        starts = starts or [held(voice.cache) for voice in voices]
        for outcomes, outcome in zip(told, _answer(asked, item, probe, voices), strict=True):
            outcomes.append(outcome)
    return _performances(voices, starts, told)


def _from_one_prompt(
    asked: ModelUnderTest, item: Item, prefix: tuple[int, ...]
) -> list[RecipeResult]:
    voices = asked.stage.read(prefix, asked.recipes)
    starts = [held(voice.cache) for voice in voices]
    only_targets = not any(probe.choices or probe.limit for probe in item.probes)
    way = _answer_together if only_targets else _answer_in_turn
    answered = way(asked, item, voices)
    return _performances(voices, starts, [list(one) for one in zip(*answered, strict=True)])


def converse(
    asked: ModelUnderTest, item: Item, context: Part, mode: Mode, most: int
) -> list[RecipeResult]:
    """The probes as turns on one cache; the gold answers, not the model's own, become its history.

    In mode "aware" the first question is compressed together with the context, as in SCBench.
    """
    prefix, first = asked.frame.prefix(item, context), asked.frame.query(item, item.probes[0])
    voices = asked.stage.read((*prefix, *first) if mode == "aware" else prefix, asked.recipes)
    starts = [held(voice.cache) for voice in voices]
    if mode == "agnostic":
        asked.stage.advance(voices, first)
    told: list[list[Outcome]] = [[] for _ in voices]
    for place, probe in enumerate(item.probes):
        if place:
            before = item.probes[place - 1]
            turn = (*asked.frame.reply(item, before), *asked.frame.query(item, probe))
            asked.stage.advance(voices, turn)
        for outcomes, outcome in zip(told, _answer(asked, item, probe, voices), strict=True):
            outcomes.append(outcome)
    return _performances(voices, starts, told)


def _answer(
    asked: ModelUnderTest, item: Item, probe: Probe, voices: list[Sequence]
) -> list[Outcome]:
    """One probe, its question already fed; the voices stay where they are."""
    target, choices = asked.frame.target(probe), [asked.frame.ids(one) for one in probe.choices]
    scripts = [Continuation(ids) for ids in (target, *choices) if ids]
    forced = asked.stage.force(voices, scripts) if scripts else [[] for _ in voices]
    texts = _write(asked, probe, voices)
    return [
        _outcome(results, bool(target), text) for results, text in zip(forced, texts, strict=True)
    ]


def _answer_in_turn(
    asked: ModelUnderTest, item: Item, voices: list[Sequence]
) -> list[list[Outcome]]:
    """All probes of an item, each from its own copy of the caches: `[probe][voice]`."""
    answered = []
    for probe in item.probes:
        copies = [voice.fork() for voice in voices]
        asked.stage.advance(copies, asked.frame.query(item, probe))
        answered.append(_answer(asked, item, probe, copies))
    for voice, copy in zip(voices, copies, strict=True):
        voice.end = copy.end
    return answered


def _answer_together(
    asked: ModelUnderTest, item: Item, voices: list[Sequence]
) -> list[list[Outcome]]:
    """All probes of an item that has targets only, as rows of one batch: `[probe][voice]`."""
    scripts = []
    for probe in item.probes:
        query = asked.frame.query(item, probe)
        scripts.append(Continuation((*query, *asked.frame.target(probe)), len(query)))
    forced = asked.stage.force(voices, scripts)
    return [
        [_outcome([results[place]], True, None) for results in forced]
        for place in range(len(scripts))
    ]


def _write(asked: ModelUnderTest, probe: Probe, voices: list[Sequence]) -> list[str | None]:
    """Generated answers of copies of the voices, cut before the probe's stop strings."""
    if not probe.limit:
        return [None] * len(voices)
    copies = [voice.fork() for voice in voices]
    done = _finished(asked, probe.stop)
    answers = asked.stage.generate(copies, probe.limit, done)
    for voice, copy in zip(voices, copies, strict=True):
        voice.end = copy.end
    return [_text(asked, answer, probe.stop) for answer in answers]


def _finished(asked: ModelUnderTest, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
    def done(answer: list[int]) -> bool:
        if answer[-1] in asked.ends:
            return True
        text = _decoded(asked, answer).lstrip() if stop else ""
        return any(end in text for end in stop)

    return done


def _text(asked: ModelUnderTest, answer: list[int], stop: tuple[str, ...]) -> str:
    text = _decoded(asked, [token for token in answer if token not in asked.ends]).lstrip()
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=None)]


def _decoded(asked: ModelUnderTest, ids: list[int]) -> str:
    return str(asked.tokenizer.decode(ids, skip_special_tokens=True))


def _outcome(forced: abc.Sequence[TokenScores], has_target: bool, text: str | None) -> Outcome:
    target = forced[0] if has_target else TokenScores((), ())
    choices = tuple(sum(one.logprobs) for one in forced[1 if has_target else 0 :])
    return Outcome(target.logprobs, target.hits, choices, text)


def _performances(
    voices: list[Sequence], starts: list[CacheStats], told: list[list[Outcome]]
) -> list[RecipeResult]:
    return [
        RecipeResult(voice.recipe, tuple(outcomes), start, voice.end)
        for voice, start, outcomes in zip(voices, starts, told, strict=True)
    ]
