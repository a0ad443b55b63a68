"""Texts to token ids, each part apart, so that the cut between context and question never moves."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvhive.evaluation.types import Item, Part, Probe

_MARKS = ("kvhive-mark-one", "kvhive-mark-two", "kvhive-mark-three")


@dataclass(frozen=True)
class ChatFormat:
    """What a model's chat form puts around words.

    head: before a user's first words. answer: from the end of a user's turn to the answer. gap:
    between that and words the answer begins with. turn: from the end of an answer to the user's
    next words.
    """

    tokenizer: PreTrainedTokenizerBase
    head: str
    answer: str
    gap: str
    turn: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Read off the chat template; plain "Answer:" lines for a model without one.

        Raises `ValueError` for a template that hides the words.
        """
        if not tokenizer.chat_template:
            return cls(tokenizer, _begin(tokenizer), "\nAnswer:", " ", "\n\n")
        roles = ("user", "assistant", "user")
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
        opened = str(
            tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        )
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        head, found, answer = opened.partition(_MARKS[0])
        rest, also_found, _ = whole.partition(_MARKS[2])
        turn = rest.partition(_MARKS[1])[2]
        if not (found and also_found and turn):
            raise ValueError("the model's chat template does not show the words of every turn")
        return cls(tokenizer, head, answer, "", turn)

    def ids(self, part: Part) -> tuple[int, ...]:
        """Token ids of a part alone, without special tokens added; ids pass through."""
        if not isinstance(part, str):
            return part
        if not part:
            return ()
        encoded = self.tokenizer(part, add_special_tokens=False, verbose=False)
        return tuple(encoded.input_ids)

    def prefix(self, item: Item, part: Part) -> tuple[int, ...]:
        """Ids of the item's context (`part` is its prefix or its bare form), the user's turn left
        open.
        """
        head = self.head if item.chat else ""
        if isinstance(part, str):
            return self.ids(head + part)
        return (*self.ids(head), *part)

    def query(self, item: Item, probe: Probe) -> tuple[int, ...]:
        """Ids of a question, up to where its answer begins."""
        if not item.chat:
            return (*self.ids(probe.query), *self.ids(probe.cue))
        opening = self.answer + self.gap + probe.cue if probe.cue else self.answer
        return (*self.ids(probe.query), *self.ids(opening))

    def target(self, probe: Probe) -> tuple[int, ...]:
        """Ids of the target, empty when there is none."""
        return () if probe.target is None else self.ids(probe.target)

    def reply(self, item: Item, probe: Probe) -> tuple[int, ...]:
        """Ids of the gold answer and what leads on to the user's next words."""
        return self.ids(probe.history + (self.turn if item.chat else "\n"))


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token, where the tokenizer puts one before every text."""
    ids = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""
