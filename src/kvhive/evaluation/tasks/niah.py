"""Needles in a haystack, RULER's four kinds: one, one of several, several of one, several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from kvhive.evaluation.data.made_up import random_uuid
from kvhive.evaluation.measures import CHOICE, EXACT, MARGIN, SHARE_FOUND, TOKEN_ACCURACY
from kvhive.evaluation.nouns import NOUNS
from kvhive.evaluation.tasks.base import TASKS, InText
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_INSTRUCTION = "Some special magic {kind}s are hidden within the following text. Memorise them.\n\n"
_HAY = ("book", "prose", "repeat", "needles")
_NEEDLE = "One of the special magic {kind}s for {word} is: {value}."


@dataclass(frozen=True)
class Niah(InText):
    """Base of the four. Source: RULER, Hsieh et al. 2024, arXiv:2404.06654, section 3; own text."""

    words: ClassVar[int] = 1  # different words with needles
    values: ClassVar[int] = 1  # needles a word

    tokens: int = knob(1024, "length of the context", least=1)
    hay: str = knob("book", "text around; 'prose': made up; 'needles': other needles", among=_HAY)
    kind: str = knob("number", "'number': seven digits", among=("number", "uuid"))

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Needles at random depths."""
        number = 0
        while True:
            rng = context.random(self.name, number)
            words = rng.sample(NOUNS, self.words)
            needles = {word: [self._value(rng) for _ in range(self.values)] for word in words}
            instruction = _INSTRUCTION.format(kind=self.kind)
            facts = {"length": self.tokens}
            prefix = instruction + self._hay(context, rng, needles)
            probe = self._probe(rng, needles)
            yield Item(f"{self.name}-{number}", prefix, instruction, (probe,), facts=facts)
            number += 1

    def _value(self, rng: Random) -> str:
        return (
            random_uuid(rng) if self.kind == "uuid" else str(rng.randrange(1_000_000, 10_000_000))
        )

    def _hay(self, context: TaskContext, rng: Random, needles: dict[str, list[str]]) -> str:
        lines = [
            _NEEDLE.format(kind=self.kind, word=word, value=value)
            for word, values in needles.items()
            for value in values
        ]
        if self.hay != "needles":
            return context.haystack(
                rng, self.tokens, [(rng.random(), line) for line in lines], self.hay
            )
        others = (word for word in rng.sample(NOUNS, len(NOUNS)) if word not in needles)
        size = sum(context.count(line) for line in lines)
        for word in others:
            line = _NEEDLE.format(kind=self.kind, word=word, value=self._value(rng))
            size += context.count(line) + 1
            if size > self.tokens:
                break
            lines.append(line)
        return "\n".join(rng.sample(lines, len(lines)))

    def _probe(self, rng: Random, needles: dict[str, list[str]]) -> Probe:
        """One word, one value: exact, and a choice among all values there and three others."""
        word = next(iter(needles))
        value = needles[word][0]
        values = [one for values in needles.values() for one in values]
        choices = tuple(
            rng.sample([*values, *(self._value(rng) for _ in range(3))], len(values) + 3)
        )
        asked = f"the special magic {self.kind} for {word} mentioned in the text"
        return Probe(
            f"\n\nWhat is {asked}?",
            cue=f"The special magic {self.kind} for {word} mentioned in the text is: ",
            target=value,
            choices=choices,
            gold=choices.index(value),
            history=value + ".",
        )


@TASKS.register("niah_single")
@dataclass(frozen=True)
class NiahSingle(Niah):
    """One needle."""

    measures = (EXACT, TOKEN_ACCURACY, CHOICE, MARGIN)


@TASKS.register("niah_multikey")
@dataclass(frozen=True)
class NiahMultikey(Niah):
    """Four needles with different words, one of them asked."""

    measures = (EXACT, TOKEN_ACCURACY, CHOICE, MARGIN)
    words: ClassVar[int] = 4


class _Listed(Niah):
    """The answer is a list, written by the model and searched for every value."""

    def _listed(self, words: list[str], values: list[str]) -> Probe:
        names = " and ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]
        asked = f"all the special magic {self.kind}s for {names} mentioned in the text"
        return Probe(
            f"\n\nWhat are {asked}?",
            cue=f"The special magic {self.kind}s for {names} mentioned in the text are: ",
            references=tuple(values),
            limit=(30 if self.kind == "uuid" else 12) * len(values),
            stop=("\n\n",),
            history=", ".join(values) + ".",
        )


@TASKS.register("niah_multivalue")
@dataclass(frozen=True)
class NiahMultivalue(_Listed):
    """Four values for the same word, all asked."""

    measures = (SHARE_FOUND,)
    values: ClassVar[int] = 4

    def _probe(self, rng: Random, needles: dict[str, list[str]]) -> Probe:
        ((word, values),) = needles.items()
        return self._listed([word], values)


@TASKS.register("niah_multiquery")
@dataclass(frozen=True)
class NiahMultiquery(_Listed):
    """Four words, several asked together."""

    measures = (SHARE_FOUND,)
    words: ClassVar[int] = 4

    asked: int = knob(3, "words asked together", least=2, most=4)

    def _probe(self, rng: Random, needles: dict[str, list[str]]) -> Probe:
        words = list(needles)[: self.asked]
        return self._listed(words, [needles[word][0] for word in words])
