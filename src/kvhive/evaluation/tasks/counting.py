"""Counting words (RULER cwe and fwe): which are the most frequent?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from kvhive.evaluation.data.made_up import coded_word
from kvhive.evaluation.measures import SHARE_FOUND
from kvhive.evaluation.nouns import NOUNS
from kvhive.evaluation.tasks.base import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_LIST_INSTRUCTION = (
    "Below is a numbered list of words. Memorise the ones that appear most often.\n\n"
)
_CODED_INSTRUCTION = "Read the following coded text and track the frequency of each coded word.\n\n"


@TASKS.register("cwe")
@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which a few words come ten times as often as others; name the frequent
    ones.

    Source: RULER, arXiv:2404.06654, section 3 (30 times against 3 there); own word list.
    """

    measures = (SHARE_FOUND,)
    often: ClassVar[int] = 10  # times a frequent word comes, a rare one `rare` times
    rare: ClassVar[int] = 1

    tokens: int = knob(1024, "length of the list, about", least=1)
    common: int = knob(5, "frequent words", least=1, most=20)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New words every time."""
        number = 0
        while True:
            rng = context.random("cwe", number)
            words = rng.sample(NOUNS, len(NOUNS))
            common = words[: self.common]
            listed = self._listed(context, common, words[self.common :])
            rng.shuffle(listed)
            body = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
            probe = Probe(
                f"\n\nWhat are the {self.common} most common words in the list above?",
                cue=f"The {self.common} most common words in the list are: 1.",
                references=tuple(common),
                limit=8 * self.common,
                stop=("\n\n",),
            )
            facts = {"length": self.tokens}
            yield Item(
                f"cwe-{number}", _LIST_INSTRUCTION + body, _LIST_INSTRUCTION, (probe,), facts=facts
            )
            number += 1

    def _listed(self, context: TaskContext, common: list[str], others: list[str]) -> list[str]:
        """Words as often as they come; all of them more often where the list is to be longer than
        they are.
        """
        sizes = {word: context.count(f" 100. {word}") for word in (*common, *others)}
        size = self.often * sum(sizes[word] for word in common)
        times = -(-self.tokens // (size + self.rare * sum(sizes[word] for word in others)))
        listed = common * self.often
        for word in others:
            size += self.rare * sizes[word]
            if times * size > self.tokens:
                break
            listed += [word] * self.rare
        return listed * times


@TASKS.register("fwe")
@dataclass(frozen=True)
class FrequentWords(Task):
    """Coded words with Zipf frequencies (exponent 2); name the three most frequent.

    Source: RULER, arXiv:2404.06654, section 3.
    """

    measures = (SHARE_FOUND,)

    tokens: int = knob(1024, "length of the text, about", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New words every time."""
        number = 0
        while True:
            rng = context.random("fwe", number)
            words = _different(rng, 20)
            weights = [1 / rank**2 for rank in range(1, len(words) + 1)]
            total = self.tokens // max(1, context.count(" " + words[0]))
            share = total / sum(weights)
            listed = [
                word
                for word, weight in zip(words, weights, strict=True)
                for _ in range(max(1, round(weight * share)))
            ]
            rng.shuffle(listed)
            probe = Probe(
                "\n\nWhat are the three most frequently appearing words in the coded text above?",
                cue="The three most frequently appearing words are: 1.",
                references=tuple(words[:3]),
                limit=40,
                stop=("\n\n",),
            )
            body = " ".join(listed)
            facts = {"length": self.tokens}
            yield Item(
                f"fwe-{number}",
                _CODED_INSTRUCTION + body,
                _CODED_INSTRUCTION,
                (probe,),
                facts=facts,
            )
            number += 1


def _different(rng: Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[coded_word(rng)] = None
    return list(words)
