"""What all recipes of one comparison share, and one recipe's run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.report import Report
from kvhive.comparison.clock import seconds_when_done
from kvhive.comparison.fidelity import Distance, distance, mean
from kvhive.comparison.result import Answer, Result
from kvhive.comparison.survivors import Survivors
from kvhive.inference.generation import check_length, decode, end_tokens, read
from kvhive.inference.modes import QUESTION_MODES, QuestionMode
from kvhive.inference.prompt import Prompt
from kvhive.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, str, float], None]
REFERENCE = Recipe.parse("full")
_READING, _WARM_UP = 0.4, 64


@dataclass(frozen=True)
class Generated:
    """A greedy answer: its ids, the logits each was taken from, and the seconds of every step."""

    ids: list[int]
    logits: list[Tensor]
    seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """What all recipes of one comparison share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    questions: tuple[str, ...]
    limit: int
    mode: QuestionMode
    chunk: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("compare: give at least one question")
        for name, tokens in (("max_new_tokens", self.limit), ("prefill_chunk", self.chunk)):
            if tokens is not None and tokens < 1:
                raise ValueError(f"{name} must be at least 1, got {tokens}")
        if self.mode not in QUESTION_MODES:
            raise ValueError(f"mode must be one of {', '.join(QUESTION_MODES)}, got {self.mode!r}")
        if self.prompt.turns and self.mode == "aware":
            raise ValueError(
                "turns follow one another on the cache of the document, so that none can be read "
                'together with it: leave mode "aware" out, or turns'
            )

    def order(self, wanted: list[Recipe]) -> list[Recipe]:
        """The reference, unless it cannot run, and then the others; all of them checked."""
        others = [recipe for recipe in wanted if recipe != REFERENCE]
        if not others or REFERENCE in wanted or self.fits(REFERENCE):
            others.insert(0, REFERENCE)
        for recipe in others:
            self._check_length(recipe)
        return others

    def warm_up(self) -> None:
        """A few steps whose time nobody counts: first calls load weights and kernels."""
        cache = HiveCache.for_model(self.model, REFERENCE)
        logits = read(self.model, cache, self.prompt.prefix[:_WARM_UP])
        for _ in decode(self.model, cache, logits, 3):
            pass

    def run(
        self, recipe: Recipe, reference: list[Generated] | None
    ) -> tuple[Result, list[Generated]]:
        """Read, answer every question, and measure the distance from the reference."""
        name, count = str(recipe), len(self.questions)
        base, prefill_seconds = None, []
        unread: tuple[int, ...] = ()  # of the turn before
        answers: list[Generated] = []
        distances: list[Distance] = []
        for number in range(count):
            if base is None or self.mode == "aware":
                start = self._seconds()
                base, logits = self._read(recipe, number, name)
                prefill_seconds.append(self._seconds() - start)
            if number == 0:
                report, survivors = base.report(), Survivors.of(base)
            self._notify(
                name, f"question {number + 1} of {count}", number / count, after_reading=True
            )
            cache = base
            if self.mode == "agnostic":
                cache = base.fork()
                logits = read(self.model, cache, (*unread, *self.prompt.questions[number]))
            given = None if reference is None else reference[number]
            own, far, answered = self._answer(cache, logits, given)
            answers.append(own)
            distances += far
            if self.prompt.turns:
                base, unread = answered, self._unread(given or own)
        self._notify(name, "done", 1.0)
        result = self._result(recipe, answers, report, survivors, prefill_seconds, distances)
        return result, answers

    def _read(self, recipe: Recipe, number: int, name: str) -> tuple[HiveCache, Tensor]:
        """A cache that holds the document (aware: and the question), and the logits after it."""
        ids = self.prompt.prefix
        if self.mode == "aware":
            ids += self.prompt.questions[number]
        doing = f"reading {len(ids):,} tokens"
        self._notify(name, doing, 0.0)
        cache = HiveCache.for_model(self.model, recipe)
        logits = read(
            self.model,
            cache,
            ids,
            self.chunk,
            lambda share: self._notify(name, doing, share * _READING),
        )
        return cache, logits

    def _generate(self, cache: HiveCache, logits: Tensor) -> Generated:
        ends = end_tokens(self.model, self.tokenizer)
        pairs, times = [], []
        for pair in decode(self.model, cache, logits, self.limit, ends):
            times.append(self._seconds())
            pairs.append(pair)
        seconds = [later - sooner for sooner, later in pairwise(times)]
        return Generated([token for token, _ in pairs], [step for _, step in pairs], seconds)

    def _seconds(self) -> float:
        return seconds_when_done(self.model.device)

    def _answer(
        self, cache: HiveCache, logits: Tensor, reference: Generated | None
    ) -> tuple[Generated, list[Distance], HiveCache]:
        """The own answer, from a copy of `cache`; KL and top-1 agreement at every token of the
        reference's, fed through `cache`; and a cache that holds the reference's answer (without
        one, its own) but for the last token.
        """
        copy = cache.fork()
        own = self._generate(copy, logits)
        if reference is None:
            return own, [], copy
        if own.ids == reference.ids:
            pairs = zip(reference.logits, own.logits, strict=True)
            return own, [distance(*pair) for pair in pairs], copy
        distances = []
        for place, token in enumerate(reference.ids):
            distances.append(distance(reference.logits[place], logits))
            if place < len(reference.ids) - 1:
                logits = read(self.model, cache, [token])
        return own, distances, cache

    def _unread(self, answer: Generated) -> tuple[int, ...]:
        """The last token of an answer, unless the chat form writes it: an end of the turn."""
        last = answer.ids[-1]
        return () if last in end_tokens(self.model, self.tokenizer) else (last,)

    def _result(
        self,
        recipe: Recipe,
        generated: list[Generated],
        report: Report,
        survivors: Survivors,
        prefill_seconds: list[float],
        distances: list[Distance],
    ) -> Result:
        reference = recipe == REFERENCE
        if reference:
            distances = [(0.0, True) for one in generated for _ in one.ids]
        texts = [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in generated]
        seconds = [step for one in generated for step in one.seconds]
        return Result(
            recipe=str(recipe),
            reference=reference,
            answers=tuple(
                Answer(question, str(text).strip(), tuple(one.ids))
                for question, text, one in zip(self.questions, texts, generated, strict=True)
            ),
            report=report,
            survivors=survivors,
            prefill_seconds=sum(prefill_seconds) / len(prefill_seconds),
            decode_rate=1 / median(seconds) if seconds else None,
            fidelity=mean(distances),
        )

    def fits(self, recipe: Recipe) -> bool:
        """Whether the model stays within the length it was trained on."""
        try:
            self._check_length(recipe)
        except ValueError:
            return False
        return True

    def _check_length(self, recipe: Recipe) -> None:
        cache = HiveCache.for_model(self.model, recipe)
        check_length(cache, self.prompt.longest(self.limit), self.limit, self.chunk)

    def _notify(self, recipe: str, doing: str, share: float, after_reading: bool = False) -> None:
        if self.progress is not None:
            self.progress(
                recipe, doing, _READING + share * (1 - _READING) if after_reading else share
            )
