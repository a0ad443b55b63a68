"""What a task works with: records, a tokenizer to count with, random numbers, and haystacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from kvhive.evaluation.data import Record, Source, made_up

_SHORTEST = 12  # tokens of a made-up sentence, at least
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class TaskContext:
    """Everything an item may depend on; the same context gives the same items."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    seed: int

    def records(self, name: str) -> list[Record]:
        """All records of a data set."""
        return self.source.records(name)

    def random(self, *key: object) -> Random:
        """Random numbers for this seed and key, whatever was drawn before."""
        return Random("/".join(map(str, (self.seed, *key))))

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text alone."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def count(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self.ids(text))

    def cut(self, text: str, tokens: int) -> str:
        """The text's first `tokens` tokens, cut between sentences where there are several."""
        if self.count(text) <= tokens:
            return text
        kept, room = [], tokens
        for one in _SENTENCE.split(text):
            room -= self.count(one) + 1
            if room < 0:
                break
            kept.append(one)
        return " ".join(kept) or str(self.tokenizer.decode(list(self.ids(text)[:tokens])))

    def passage(self, rng: Random, tokens: int, hay: str = "book") -> tuple[int, ...]:
        """Ids of `tokens` tokens of running text. hay: "book", a random one from a random paragraph
        on, or "prose", made-up sentences.

        Raises `ValueError` when no book is that long.
        """
        ids = self.ids(self._text(rng, tokens, hay))
        if len(ids) < tokens:
            raise ValueError(f"the books are too short for a passage of {tokens} tokens")
        return ids[:tokens]

    def sentences(self, rng: Random, tokens: int, hay: str = "book") -> list[str]:
        """Consecutive sentences of running text, about `tokens` tokens of them."""
        found, room = [], tokens
        for one in _SENTENCE.split(self._text(rng, tokens, hay)):
            room -= self.count(one) + 1
            if room < 0:
                break
            found.append(one)
        return found

    def _text(self, rng: Random, tokens: int, hay: str) -> str:
        """At least `tokens` tokens, if there are so many."""
        if hay == "prose":
            return made_up.prose(rng, tokens // _SHORTEST + 1)
        text: str = rng.choice(self.records("books"))["text"]
        start = text.find("\n\n", rng.randrange(max(1, len(text) - 8 * tokens))) + 2
        return text[start : start + 12 * tokens]

    def haystack(
        self,
        rng: Random,
        tokens: int,
        needles: Sequence[tuple[float, str]],
        hay: str = "book",
    ) -> str:
        """About `tokens` tokens of text with each needle on a line of its own at its depth in 0..1.

        hay: as of `passage`, or "repeat" for the same four sentences over and over.
        """
        room = max(0, tokens - sum(self.count(text) + 2 for _, text in needles))
        lines = _repeated(self, room) if hay == "repeat" else self.sentences(rng, room, hay)
        depths = sorted(needles, key=lambda needle: -needle[0])
        for depth, text in depths:
            place = round(depth * len(lines))
            lines.insert(place, f"\n\n{text}\n\n")
        joined = " ".join(lines)
        return re.sub(r" *\n\n *", "\n\n", joined).strip()


_SAME = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.")


def _repeated(context: TaskContext, tokens: int) -> list[str]:
    tokens_each = context.count(" ".join(_SAME) + " ")
    return [*_SAME] * max(1, tokens // tokens_each)
