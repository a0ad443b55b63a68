"""A document that was read once and compressed, to be asked many questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.report import Report
from kvhive.calibration import Profile
from kvhive.inference import generation
from kvhive.inference.conversation import Conversation
from kvhive.inference.document import Document
from kvhive.inference.prompt import Prompt
from kvhive.model.tokenizers import remember
from kvhive.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reading:
    """A document in a compressed cache; made by `kvhive.read`.

    name: of the document. cache: what was kept of it, which no question changes. `with
    reading.cache.freeze(): ...` asks without evicting any more of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        cache: HiveCache,
        prefill_chunk: int | None = None,
    ) -> None:
        self.name, self.cache = name, cache
        self._model, self._tokenizer, self._chunk = model, tokenizer, prefill_chunk

    def ask(self, question: str, **options: Any) -> str:
        """The answer to a question that sees the document alone. options: as `Conversation.ask`."""
        return self.conversation().ask(question, **options)

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """As `ask`, in pieces of text as they come, each of whole characters."""
        return self.conversation().stream(question, **options)

    def conversation(self) -> Conversation:
        """Questions of which each sees the earlier ones and their answers, on a copy of the
        cache; there may be several side by side.
        """
        return Conversation(
            self._model, self._tokenizer, self.cache.fork(), prefill_chunk=self._chunk
        )

    def report(self) -> Report:
        """Tokens and bytes that are held of the document."""
        return self.cache.report()

    def __repr__(self) -> str:
        return f"Reading({self.name!r}, {self.cache!r})"


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str | Path | Document,
    recipe: Recipe | str = "h2o@0.4",
    *,
    profile: Profile | str | Path | None = None,
    prefill_chunk: int | None = None,
) -> Reading:
    """Let the model read a document once, compressed by the recipe, to ask questions later.

    ```python
    reading = kvhive.read(model, tokenizer, Path("report.pdf"), "h2o@0.4")
    print(reading.ask("What was decided?"))
    ```

    document: the text itself, or the `Path` of a text, Markdown or PDF file. profile: for a recipe
    that reads one. prefill_chunk: read so many tokens at a time and evict after each step; None:
    all at once. Nothing is known of the questions while reading; for a single question known
    beforehand give `model.generate` document and question together, with a `HiveCache`.

    Raises `ValueError` for an empty document, for a text that is the name of a file, for a recipe
    that cannot work, and for a document beyond the length the model was trained on; `OSError` and
    `ImportError` as `Document.read`.
    """
    source = _document(document)
    prompt = Prompt.build(tokenizer, source.text, [])
    remember(model, tokenizer)
    cache = HiveCache.for_model(model, recipe, profile)
    generation.check_length(cache, len(prompt.prefix), 1, prefill_chunk)
    generation.read(model, cache, prompt.prefix, prefill_chunk)
    return Reading(model, tokenizer, source.name, cache, prefill_chunk)


def _document(given: str | Path | Document) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, Path):
        return Document.read(str(given))
    a_name = given.strip() and len(given) < 256 and "\n" not in given and "\0" not in given
    if a_name and Path(given).is_file():
        raise ValueError(
            f"{given!r} is the name of a file; give Path({given!r}) to read it, or its text"
        )
    return Document("text", given)
