"""A model's chat form: what its template puts around a user's words and an answer, as token ids.

Parts are tokenised apart, so that the cut between a context and its question never moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = str | tuple[int, ...]  # text, or token ids where text would not survive being cut

_MARKS = ("kvhive-mark-one", "kvhive-mark-two", "kvhive-mark-three")


@dataclass(frozen=True)
class ChatFormat:
    """What is written around words; plain "Answer:" lines for a model without a chat template.

    head: before a user's first words. answer: from the end of a user's turn to the answer. gap:
    between that and words the answer begins with.
    """

    tokenizer: PreTrainedTokenizerBase
    head: str
    answer: str
    gap: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Read off the chat template. Raises `ValueError` for one that hides or repeats words."""
        if not tokenizer.chat_template:
            return cls(tokenizer, _first_token(tokenizer), "\nAnswer:", " ")
        head, answer = _around(_MARKS[0], _chat(tokenizer, 1, add_generation_prompt=True))
        return cls(tokenizer, head, answer, "")

    @cached_property
    def turn(self) -> str:
        """From the end of an answer to the user's next words.

        Raises `ValueError` for a template that hides or repeats words of a second turn.
        """
        if not self.tokenizer.chat_template:
            return "\n\n"
        _, rest = _around(_MARKS[1], _chat(self.tokenizer, 3, add_generation_prompt=False))
        return _around(_MARKS[2], rest)[0]

    def ids(self, part: Part, plain: bool = False) -> tuple[int, ...]:
        """Token ids of a part alone, without special tokens added; ids pass through.

        plain: what looks like a special token in the text is ordinary text.
        """
        if not isinstance(part, str):
            return part
        if not part:
            return ()
        return tuple(self.encoded(part, plain).input_ids)

    def encoded(self, text: str, plain: bool = False, **options: Any) -> Any:
        """What the tokenizer makes of a text alone. options: more for it."""
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, verbose=False, **options
        )

    def opening(self, context: Part) -> tuple[int, ...]:
        """A context at the beginning of a user's turn, which stays open."""
        if isinstance(context, str):
            return self.ids(self.head + context)
        return (*self.ids(self.head), *context)

    def question(self, query: Part, cue: str = "") -> tuple[int, ...]:
        """The end of the user's turn, up to where the answer begins; cue: its first words."""
        return (*self.ids(query), *self.ids(self.answer + (self.gap + cue if cue else "")))


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` as a user's turn, to be answered; as it is when the model has no chat template."""
    chat = ChatFormat.of(tokenizer)
    after = chat.answer if tokenizer.chat_template else ""
    return [*chat.ids(chat.head), *chat.ids(text, plain=True), *chat.ids(after)]


def _chat(tokenizer: PreTrainedTokenizerBase, turns: int, add_generation_prompt: bool) -> str:
    """The text of the first turns of a chat between user and assistant, a mark in each.

    Raises `ValueError` for a template that fails.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(
            messages[:turns], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of the model's maker
        raise ValueError(
            f"the model's chat template cannot be used ({type(error).__name__}: {error}); "
            "correct it, or name another model"
        ) from error
    return str(text)


def _around(mark: str, text: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError("the model's chat template does not show the words of every turn once")
    return before, after


def _first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token, where the tokenizer puts one before every text."""
    first = tokenizer("a").input_ids[:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""
