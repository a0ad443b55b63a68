"""A document and questions as token ids, cut where the question begins.

The document comes first and the question last, in one user turn: what a cache keeps of the document
can then be decided before any question is known. The two parts are tokenised apart, so that the cut
is the same for every question.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from kvhive.model.chat import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_QUESTION = "Summarise this document in three sentences."
_GAP = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Token ids of `[head | document | question]`; head is what the chat form writes first.

    prefix: ids of head and document. head: how many of them come before the document. spans: for
    each document token, the characters `(start, end)` of the document it stands for. questions: ids
    of each question with the end of its turn; as later turns of a conversation, also with what the
    chat form writes after an answer. chat: False when the model has no chat template, so that the
    plain form "Question: ... Answer:" is used. turns: whether the questions are turns of one
    conversation.
    """

    prefix: tuple[int, ...]
    head: int
    spans: tuple[tuple[int, int], ...]
    questions: tuple[tuple[int, ...], ...]
    chat: bool
    turns: bool = False

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        questions: list[str],
        turns: bool = False,
    ) -> Prompt:
        """Words in the document that look like special tokens are read as ordinary text.

        Raises `ValueError` for a blank document or question, and for a chat template that does not
        show the user's words.
        """
        if not document.strip():
            raise ValueError("the document is empty: there is no text to ask about")
        chat = ChatFormat.of(tokenizer)
        head = chat.ids(chat.head)
        body, spans = _document_ids(chat, document)
        closed = [question_ids(chat, question) for question in questions]
        if turns:
            closed[1:] = [(*chat.ids(chat.turn), *question) for question in closed[1:]]
        with_chat = bool(tokenizer.chat_template)
        return cls((*head, *body), len(head), spans, tuple(closed), with_chat, turns)

    def longest(self, new: int) -> int:
        """The most tokens before an answer, where answers have at most `new`."""
        sizes = [len(question) for question in self.questions]
        if self.turns:
            return len(self.prefix) + sum(sizes) + new * (len(sizes) - 1)
        return len(self.prefix) + max(sizes, default=0)


def question_ids(chat: ChatFormat, question: str) -> tuple[int, ...]:
    """Ids of a question at the end of a user's turn, up to where the answer begins.

    Raises `ValueError` for a blank question.
    """
    if not question.strip():
        raise ValueError("a question is empty; ask something, or leave the question out")
    form = "{}" if chat.tokenizer.chat_template else "Question: {}"
    return (*chat.ids(form.format(question.strip()), plain=True), *chat.ids(chat.answer))


def _document_ids(
    chat: ChatFormat, document: str
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Ids of the document and the gap after it, and the document's characters of each."""
    text, end = document + _GAP, len(document)
    if chat.tokenizer.is_fast:
        encoded = chat.encoded(text, plain=True, return_offsets_mapping=True)
        ids, spans = tuple(encoded.input_ids), encoded.offset_mapping
    else:
        ids = chat.ids(text, plain=True)
        spans = _spans_by_length(chat.tokenizer, ids)
    return ids, tuple((min(first, end), min(last, end)) for first, last in spans)


def _spans_by_length(
    tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Spans for a tokenizer that does not give them: from the length of each token's text."""
    ends = [0]
    for token in ids:
        ends.append(ends[-1] + len(str(tokenizer.decode([token]))))
    return list(pairwise(ends))
