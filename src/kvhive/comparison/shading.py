"""The document's words, and how many heads kept them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvhive.comparison.survivors import Survivors
from kvhive.inference.prompt import Prompt

_WORD = re.compile(r"\S+|\s+")


@dataclass(frozen=True)
class Word:
    """A word, or the space between two.

    share: how many of all heads hold it, in [0, 1]; the mean over its tokens when it has several;
    None for space. tokens: how many tokens it touches.
    """

    text: str
    share: float | None
    tokens: int


def shade(document: str, prompt: Prompt, survivors: Survivors) -> list[Word]:
    """All words and spaces of `document`, in order, with the share of heads that hold each word."""
    count = len(survivors.rows)
    heads = survivors.heads[prompt.head : prompt.head + len(prompt.spans)].tolist()
    words, first = [], 0
    for match in _WORD.finditer(document):
        while first < len(heads) and prompt.spans[first][1] <= match.start():
            first += 1
        last = first
        while last < len(heads) and prompt.spans[last][0] < match.end():
            last += 1
        touching = heads[first:last]
        share = sum(touching) / len(touching) / count if touching else 0.0
        is_space = match.group().isspace()
        words.append(Word(match.group(), None if is_space else share, len(touching)))
    return words


def pieces(document: str, prompt: Prompt) -> list[str]:
    """The text of every token of the prompt, for maps; empty for what the chat form puts first."""
    texts, end = [""] * prompt.head, 0
    for start, stop in prompt.spans:
        # Tokens that share a character (parts of one letter) show it once.
        texts.append(document[max(start, end) : stop])
        end = max(end, stop)
    return texts
