"""Questions and answers that follow one another on one cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.report import Report
from kvhive.inference.generation import check_length, decode, end_tokens, read
from kvhive.inference.prompt import question_ids
from kvhive.inference.sampling import Sampling
from kvhive.inference.text_pieces import pieces
from kvhive.model.chat import ChatFormat
from kvhive.model.tokenizers import remember
from kvhive.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST = 256  # tokens of an answer, unless another number is asked for


class Conversation:
    """Each question sees the earlier ones and their answers, as far as the recipe kept them.

    cache: all that was read, asked and answered. lead: token ids to be read before the first
    question, such as what the chat form begins with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: HiveCache,
        lead: tuple[int, ...] = (),
        prefill_chunk: int | None = None,
    ) -> None:
        remember(model, tokenizer)
        self.cache = cache
        self._model, self._tokenizer, self._chunk = model, tokenizer, prefill_chunk
        self._chat, self._ends = ChatFormat.of(tokenizer), end_tokens(model, tokenizer)
        self._lead = lead  # what must be read before the next question
        self._answer: Generator[str] | None = None  # that is streamed now

    @classmethod
    def begin(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe | str = "h2o@0.4",
        prefill_chunk: int | None = None,
    ) -> Conversation:
        """A conversation without a document, on an empty cache. Raises `ValueError` for a recipe
        that cannot work.
        """
        cache, chat = HiveCache.for_model(model, recipe), ChatFormat.of(tokenizer)
        return cls(model, tokenizer, cache, chat.ids(chat.head), prefill_chunk)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = MOST,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> str:
        """The answer, at most `max_new_tokens` tokens long; the likeliest tokens, or drawn as
        `Sampling` says.

        Raises `ValueError` for a blank question, for settings out of range, and when the model
        would be led beyond the length it was trained on.
        """
        sampling = Sampling(temperature, top_k, top_p)
        return "".join(self._stream(question, max_new_tokens, sampling)).strip()

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int = MOST,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[str]:
        """As `ask`, in pieces of text as they come, each of whole characters.

        An answer may be left before its end; the next question ends it.
        """
        return self._stream(question, max_new_tokens, Sampling(temperature, top_k, top_p))

    def report(self) -> Report:
        """What the cache holds now."""
        return self.cache.report()

    def _stream(self, question: str, limit: int, sampling: Sampling) -> Iterator[str]:
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
        if self._answer is not None:
            self._answer.close()
        ids = (*self._lead, *question_ids(self._chat, question))
        total = self.cache.get_seq_length() + len(ids)
        check_length(self.cache, total, limit, self._chunk or len(ids))
        self._answer = self._pieces(ids, limit, sampling)
        return self._answer

    def _pieces(self, ids: tuple[int, ...], limit: int, sampling: Sampling) -> Generator[str]:
        yield from pieces(self._tokenizer, self._tokens(ids, limit, sampling))

    def _tokens(self, ids: tuple[int, ...], limit: int, sampling: Sampling) -> Iterator[int]:
        logits = read(self._model, self.cache, ids, self._chunk)
        for token, _ in decode(self._model, self.cache, logits, limit, self._ends, sampling):
            # The last token has not been read yet, and an end is written by the chat form.
            unread = () if token in self._ends else (token,)
            self._lead = (*unread, *self._chat.ids(self._chat.turn))
            yield token
