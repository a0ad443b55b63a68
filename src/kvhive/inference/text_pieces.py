"""Tokens as text, piece by piece as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens without special ones; a letter made of several tokens comes whole.

    Joined, the pieces are what the tokenizer makes of all tokens at once. Only the last few are
    decoded again for every new one.
    """
    ids: list[int] = []
    start = end = 0  # what is decoded for context, and what has been given out
    for token in tokens:
        ids.append(token)
        before, text = _text(tokenizer, ids[start:end]), _text(tokenizer, ids[start:])
        if len(text) > len(before) and not text.endswith(UNFINISHED):
            yield text[len(before) :]
            start, end = end, len(ids)
    rest = _text(tokenizer, ids[start:])[len(_text(tokenizer, ids[start:end])) :]
    if rest:
        yield rest


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
