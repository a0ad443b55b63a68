"""What a task works with: records, a tokenizer to count with, random numbers, and haystacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from kvhive.evaluation.data import Record, Source

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

    def book(self, rng: Random, tokens: int) -> tuple[int, ...]:
        """Ids of `tokens` tokens of a random book from a random paragraph on.

        Raises `ValueError` when no book is that long.
        """
        text = rng.choice(self.records("books"))["text"]
        start = text.find("\n\n", rng.randrange(max(1, len(text) - 8 * tokens))) + 2
        ids = self.ids(text[start : start + 12 * tokens])
        if len(ids) < tokens:
            raise ValueError(f"the books are too short for a passage of {tokens} tokens")
        return ids[:tokens]

    def sentences(self, rng: Random, tokens: int) -> list[str]:
        """Consecutive sentences of a random book, about `tokens` tokens of them."""
        text = rng.choice(self.records("books"))["text"]
        start = text.find("\n\n", rng.randrange(max(1, len(text) - 8 * tokens))) + 2
        found, room = [], tokens
        for one in _SENTENCE.split(text[start : start + 12 * tokens]):
            room -= self.count(one) + 1
            if room < 0:
                break
            found.append(one)
        return found

    def haystack(
        self,
        rng: Random,
        tokens: int,
        needles: Sequence[tuple[float, str]],
        hay: str = "book",
    ) -> str:
        """About `tokens` tokens of text with each needle on a line of its own at its depth in 0..1.

        hay: "book", or "repeat" for the same four sentences over and over.
        """
        room = max(0, tokens - sum(self.count(text) + 2 for _, text in needles))
        lines = self.sentences(rng, room) if hay == "book" else _repeated(self, room)
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
