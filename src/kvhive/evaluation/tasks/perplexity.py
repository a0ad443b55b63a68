"""Perplexity while a text streams through the cache, and of a text's end after its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import PERPLEXITY, TOKEN_ACCURACY
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.streaming import in_pieces, stream
from kvhive.evaluation.tasks.base import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe, RecipeResult
from kvhive.inference.modes import Mode
from kvhive.spec import knob

_PIECE = 64  # tokens the floor reads at a time


@dataclass(frozen=True)
class _Stream(Task):
    """Base: segments of a text, fed block by block, every policy acting after each block.

    block=1 is the methods' literal form; methods that compress prompts only never act in it. The
    first `skip` tokens are not scored: there all caches are still full. Floor: pieces of 64 tokens
    alone.
    """

    measures = (PERPLEXITY, TOKEN_ACCURACY)
    modes: ClassVar[tuple[Mode, ...]] = ("stream",)

    tokens: int = knob(1024, "tokens of a segment", least=1)
    block: int = knob(16, "tokens fed at a time", least=1)
    skip: int = knob(256, "first tokens not scored", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip >= self.tokens:
            raise ValueError(
                f"{self.name}: skip must be less than tokens, got skip={self.skip}, "
                f"tokens={self.tokens}"
            )

    def text(self, context: TaskContext) -> str:
        """The text that is cut into segments."""
        raise TypeError(f"{type(self).__name__} has no text")

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Segments side by side, from the beginning."""
        ids = context.ids(self.text(context))
        for start in range(0, len(ids) - self.tokens + 1, self.tokens):
            segment = ids[start : start + self.tokens]
            name = f"{self.name}-{start // self.tokens}"
            facts = {"length": self.tokens, "block": self.block}
            yield Item(name, segment, (), (Probe(()),), chat=False, facts=facts)

    def run(self, tested: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """All recipes on one segment."""
        return stream(tested, tested.chat.ids(item.prefix), self.block, self.skip)

    def floor(self, tested: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """Without what came more than 64 tokens before."""
        ids = tested.chat.ids(item.prefix)
        return in_pieces(tested.only_full(), ids, _PIECE, self.skip)


@TASKS.register("wikitext")
@dataclass(frozen=True)
class WikiText(_Stream):
    """WikiText-2 articles in their order. Source: Merity et al. 2016, arXiv:1609.07843."""

    data: ClassVar = ("wikitext2",)

    def text(self, context: TaskContext) -> str:
        """The articles at hand, joined by their order in the split."""
        records = sorted(context.records("wikitext2"), key=lambda record: int(record["order"]))
        return "".join(str(record["text"]) for record in records)


@TASKS.register("books")
@dataclass(frozen=True)
class Books(_Stream):
    """The first book: long, but its next words hardly need what lies far back."""

    data: ClassVar = ("books",)

    def text(self, context: TaskContext) -> str:
        """One book."""
        return str(context.records("books")[0]["text"])


@TASKS.register("wikitext_tail")
@dataclass(frozen=True)
class WikiTextTail(Task):
    """The end of a WikiText window, after its beginning was compressed once: prompt compression
    alone.
    """

    measures = (PERPLEXITY, TOKEN_ACCURACY)
    data: ClassVar = ("wikitext2",)
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic",)

    tokens: int = knob(1024, "tokens compressed", least=1)
    scored: int = knob(128, "tokens scored after them", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Windows side by side."""
        ids, size = context.ids(WikiText().text(context)), self.tokens + self.scored
        for start in range(0, len(ids) - size + 1, size):
            cut = start + self.tokens
            # The first token of the tail leads on; the others are scored.
            probe = Probe(ids[cut : cut + 1], target=ids[cut + 1 : start + size])
            name, facts = f"tail-{start // size}", {"length": self.tokens}
            yield Item(name, ids[start:cut], (), (probe,), chat=False, facts=facts)
