"""A document and questions as token ids, cut where the question begins.

The document comes first and the question last, in one user turn: what a cache keeps of the document
can then be decided before any question is known. The two parts are tokenised apart, so that the cut
is the same for every question.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_QUESTION = "Summarise this document in three sentences."
_MARK = "kvhive-document-and-question"
_GAP = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Token ids of `[head | document | question]`; head is what the chat form writes first.

    prefix: ids of head and document. head: how many of them come before the document. spans: for
    each document token, the characters `(start, end)` of the document it stands for. questions: ids
    of each question with the end of its turn. chat: False when the model has no chat template, so
    that the plain form "Question: ... Answer:" is used.
    """

    prefix: tuple[int, ...]
    head: int
    spans: tuple[tuple[int, int], ...]
    questions: tuple[tuple[int, ...], ...]
    chat: bool

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerBase, document: str, questions: list[str]
    ) -> Prompt:
        """Words in the document that look like special tokens are read as ordinary text.

        Raises `ValueError` for a blank document or question, and for a chat template that does not
        show the user's words.
        """
        if not document.strip():
            raise ValueError("the document is empty: there is no text to ask about")
        if any(not question.strip() for question in questions):
            raise ValueError("a question is empty; ask something, or leave the question out")
        chat = bool(tokenizer.chat_template)
        before, after = _chat_frame(tokenizer) if chat else (_begin(tokenizer), "\nAnswer:")
        head = _ids(tokenizer, before)
        body, spans = _document_ids(tokenizer, document)
        form, end = "{}" if chat else "Question: {}", _ids(tokenizer, after)
        asked = tuple(
            (*_ids(tokenizer, form.format(question.strip()), plain=True), *end)
            for question in questions
        )
        return cls((*head, *body), len(head), spans, asked, chat)

    @property
    def longest(self) -> int:
        """Tokens of the document with the longest question."""
        return len(self.prefix) + max((len(question) for question in self.questions), default=0)


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` as a user's turn, to be answered; as it is when the model has no chat template."""
    if not tokenizer.chat_template:
        return _ids(tokenizer, _begin(tokenizer)) + _ids(tokenizer, text, plain=True)
    before, after = _chat_frame(tokenizer)
    body = _ids(tokenizer, text, plain=True)
    return _ids(tokenizer, before) + body + _ids(tokenizer, after)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after the user's words."""
    turns = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    before, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        raise ValueError("the model's chat template does not show the user's words exactly once")
    return before, after


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token, where the tokenizer puts one before every text."""
    first = tokenizer("a").input_ids[:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False) -> list[int]:
    """Ids of `text` alone. plain: what looks like a special token is ordinary text."""
    return list(_encode(tokenizer, text, plain).input_ids) if text else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool, **options: Any) -> Any:
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=plain, verbose=False, **options
    )


def _document_ids(
    tokenizer: PreTrainedTokenizerBase, document: str
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Ids of the document and the gap after it, and the document's characters of each."""
    text, end = document + _GAP, len(document)
    if tokenizer.is_fast:
        encoded = _encode(tokenizer, text, True, return_offsets_mapping=True)
        ids, spans = list(encoded.input_ids), encoded.offset_mapping
    else:
        ids = _ids(tokenizer, text, plain=True)
        spans = _spans_by_length(tokenizer, ids)
    return ids, tuple((min(first, end), min(last, end)) for first, last in spans)


def _spans_by_length(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[int, int]]:
    """Spans for a tokenizer that does not tell them: from the length of each token's text."""
    ends = [0]
    for token in ids:
        ends.append(ends[-1] + len(str(tokenizer.decode([token]))))
    return list(pairwise(ends))
