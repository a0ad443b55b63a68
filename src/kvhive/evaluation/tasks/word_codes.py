"""Word codes: a list of words with four-digit codes, several of them asked of one context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvhive.evaluation.measures import CHOICE, EXACT, MARGIN, TOKEN_ACCURACY
from kvhive.evaluation.nouns import NOUNS
from kvhive.evaluation.tasks.base import TASKS, Conversation, InText
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_INSTRUCTION = "Memorise the code of every word below. A code will be asked later.\n\n"


@TASKS.register("word_codes")
@dataclass(frozen=True)
class WordCodes(InText, Conversation):
    """ "The code of <word> is <four digits>." in lines, or scattered in a text; a word's code is
    asked.

    The choice is among the codes of all words, so that only binding a code to its word helps.
    """

    measures = (CHOICE, EXACT, TOKEN_ACCURACY, MARGIN)

    pairs: int = knob(16, "words with codes", least=1, most=200)
    asked: int = knob(8, "words asked of one context", least=1)
    tokens: int = knob(1024, "length of the context; 0: the list alone", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.asked > self.pairs:
            raise ValueError(
                f"word_codes: asked must be at most pairs, got asked={self.asked}, "
                f"pairs={self.pairs}"
            )

    @property
    def data(self) -> tuple[str, ...]:  # type: ignore[override]
        """None for the list alone."""
        return super().data if self.tokens else ()

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New words and codes every time."""
        number = 0
        while True:
            rng = context.random("word_codes", number)
            words = rng.sample(NOUNS, self.pairs)
            codes = tuple(str(code) for code in rng.sample(range(1000, 10_000), self.pairs))
            lines = [
                f"The code of {word} is {code}." for word, code in zip(words, codes, strict=True)
            ]
            if self.tokens:
                needles = [(rng.random(), line) for line in lines]
                body = context.haystack(rng, self.tokens, needles, self.hay)
            else:
                body = "\n".join(lines)
            asked = rng.sample(range(self.pairs), self.asked)
            probes = tuple(_probe(words[place], codes, place) for place in asked)
            facts = {"pairs": self.pairs, "length": self.tokens}
            yield Item(f"codes-{number}", _INSTRUCTION + body, _INSTRUCTION, probes, facts=facts)
            number += 1


def _probe(word: str, codes: tuple[str, ...], place: int) -> Probe:
    return Probe(
        f"\n\nWhat is the code of {word}?",
        cue=f"The code of {word} is ",
        target=codes[place],
        choices=codes,
        gold=place,
        history=codes[place] + ".",
    )
