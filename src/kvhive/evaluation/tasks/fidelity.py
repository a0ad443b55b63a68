"""Fidelity: how far a compressed cache's predictions are from the full cache's, on any text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import measured
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.streaming import compare, compare_bare
from kvhive.evaluation.tasks.base import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe, RecipeResult
from kvhive.inference.modes import Mode
from kvhive.spec import knob


@TASKS.register("fidelity")
@dataclass(frozen=True)
class Fidelity(Task):
    """A text is compressed; over the tokens that follow it, next-token distributions are compared.

    kl: KL(full || recipe), mean, median and 95th percentile; top1 and top5_overlap: agreement of
    the likeliest tokens; delta_nll: loss on the true token; mass: share of the full cache's
    attention on tokens still held (mean, and of the worst head); out_err: relative error of
    attention outputs when every layer is handed the full cache's own states. The card, section 10.
    """

    measures = (
        measured("kl", "nats", lower_is_better=True),
        measured("top1"),
        measured("delta_nll", "nats", lower_is_better=True),
        measured("mass"),
        measured("mass_min"),
        measured("top5_overlap"),
        measured("kl_median", "nats", lower_is_better=True),
        measured("kl_p95", "nats", lower_is_better=True),
        measured("out_err", lower_is_better=True),
    )
    data: ClassVar = ("wikitext2",)
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic",)

    tokens: int = knob(1024, "tokens compressed", least=1)
    scored: int = knob(64, "tokens compared after them", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Windows of the articles at hand that are long enough, one of each."""
        size = self.tokens + self.scored
        for record in context.records("wikitext2"):
            ids = context.ids(record["text"])
            if len(ids) >= size:
                probe = Probe((), target=ids[self.tokens : size])
                facts = {"length": self.tokens}
                prefix = ids[: self.tokens]
                yield Item(record["id"], prefix, (), (probe,), chat=False, facts=facts)

    def run(self, tested: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """All recipes on one text."""
        return compare(tested, item)

    def floor(self, tested: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """Without the text."""
        return compare_bare(tested.only_full(), item)
