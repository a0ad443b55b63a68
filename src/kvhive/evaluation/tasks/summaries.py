"""Summarisation: CNN / Daily Mail, XSum, Multi-News."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import (
    REFERENCE_NLL,
    ROUGE_1,
    ROUGE_2,
    ROUGE_L,
    ROUGE_LSUM,
    ROUGE_TO_FULL,
    SAME_AS_FULL,
)
from kvhive.evaluation.tasks.base import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob


@dataclass(frozen=True)
class _Summary(Task):
    """Base: an article, a request, and a reference, which is scored as the answer and compared
    with.

    The loss of the reference is the sensitive measure; ROUGE of a small model's own summaries is
    low and nearly flat, so they are also compared with those the full cache writes.
    """

    measures = (
        REFERENCE_NLL,
        ROUGE_L,
        ROUGE_1,
        ROUGE_2,
        ROUGE_LSUM,
        ROUGE_TO_FULL,
        SAME_AS_FULL,
    )
    request: ClassVar[str]
    limit: ClassVar[int]

    tokens: int = knob(1500, "most tokens of an article", least=1)
    write: bool = knob(True, "write a summary too; False: only score the reference")

    def items(self, context: TaskContext) -> Iterator[Item]:
        """One for every article."""
        for record in context.records(self.data[0]):
            article = context.cut(record["article"], self.tokens)
            probe = Probe(
                f"\n\n{self.request}",
                target=record["summary"],
                references=(record["summary"],) if self.write else (),
                limit=self.limit if self.write else 0,
                stop=("\n\n",),
            )
            yield Item(record["id"], f"Article: {article}", "Article:", (probe,))


@TASKS.register("cnn_dailymail")
@dataclass(frozen=True)
class CnnDailyMail(_Summary):
    """Three sentences on a news article. Source: See et al. 2017, arXiv:1704.04368."""

    data: ClassVar = ("cnn_dailymail",)
    request: ClassVar = "Summarize the article above in three short sentences."
    limit: ClassVar = 80


@TASKS.register("xsum")
@dataclass(frozen=True)
class XSum(_Summary):
    """One sentence on a news article. Source: Narayan et al. 2018, arXiv:1808.08745."""

    data: ClassVar = ("xsum",)
    request: ClassVar = "Summarize the article above in one sentence."
    limit: ClassVar = 40


@TASKS.register("multi_news")
@dataclass(frozen=True)
class MultiNews(_Summary):
    """One paragraph on several articles. Source: Fabbri et al. 2019, arXiv:1906.01749."""

    data: ClassVar = ("multi_news",)
    request: ClassVar = "Summarize the articles above in one paragraph."
    limit: ClassVar = 120
