"""Two jobs on one context: an article to summarise, with a stray fact to find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import EXACT, REFERENCE_NLL, TOKEN_ACCURACY, Measure, Values
from kvhive.evaluation.tasks.base import TASKS, Conversation
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, MeasureInput, Probe
from kvhive.spec import knob


def _only(part: str, measure: Measure) -> Measure:
    """The measure, on probes of one part."""

    def values(given: MeasureInput) -> Values:
        pairs = zip(given.probes, measure.values(given), strict=True)
        return [value if probe.facts["part"] == part else None for probe, value in pairs]

    return Measure(f"{part}_{measure.name}", values, measure.unit, measure.lower_is_better)


@TASKS.register("summary_needle")
@dataclass(frozen=True)
class SummaryNeedle(Conversation):
    """An XSum article with a needle in it: the loss of the summary, and the needle, reported apart.

    Source: the mixed tasks of SCBench, arXiv:2412.10319.
    """

    measures = (
        _only("needle", TOKEN_ACCURACY),
        _only("needle", EXACT),
        _only("summary", REFERENCE_NLL),
    )
    data: ClassVar = ("xsum",)

    tokens: int = knob(1000, "most tokens of an article", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """One for every article; the needle is a sentence somewhere in it."""
        for record in context.records("xsum"):
            rng = context.random("summary_needle", record["id"])
            code = str(rng.randrange(10_000, 100_000))
            lines = context.cut(record["article"], self.tokens).split(". ")
            lines.insert(rng.randint(0, len(lines)), f"The code of the blue box is {code}")
            probes = (
                Probe(
                    "\n\nWhat is the code of the blue box?",
                    cue="The code of the blue box is ",
                    target=code,
                    history=f"{code}.",
                    facts={"part": "needle"},
                ),
                Probe(
                    "\n\nSummarize the article above in one sentence.",
                    target=record["summary"],
                    history=record["summary"],
                    facts={"part": "summary"},
                ),
            )
            yield Item(record["id"], "Article: " + ". ".join(lines), "Article:", probes)
