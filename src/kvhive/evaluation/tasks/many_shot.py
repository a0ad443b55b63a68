"""Many-shot classification: labels learned from examples in the context."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import EXACT, NLL, TOKEN_ACCURACY
from kvhive.evaluation.tasks.base import TASKS, Conversation
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_EXAMPLE = re.compile(r"Question: (.+?)\nType: (.+?)(?:\n|$)")


@TASKS.register("trec")
@dataclass(frozen=True)
class Trec(Conversation):
    """Examples "Question: ... Type: ..." of about 50 classes, and questions to label.

    No single token carries the answer, so eviction costs little at first. The label must be exact.
    Source: Li and Roth 2002; LongBench, arXiv:2308.14508.
    """

    measures = (EXACT, TOKEN_ACCURACY, NLL)
    data: ClassVar = ("longbench_mini",)

    shots: int = knob(40, "examples in the context", least=1)
    asked: int = knob(5, "questions of one context", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """From each long list of examples some as context and others to ask, again and again."""
        records = [one for one in context.records("longbench_mini") if one["dataset"] == "trec"]
        number = 0
        while records:
            record = records[number % len(records)]
            rng = context.random("trec", number)
            examples = _EXAMPLE.findall(record["context"] + "\n")
            if len(examples) < self.shots + self.asked:
                raise ValueError(
                    f"trec: shots + asked must be at most {len(examples)}, the examples there are, "
                    f"got {self.shots} + {self.asked}"
                )
            drawn = rng.sample(examples, self.shots + self.asked)
            shown, hidden = drawn[: self.shots], drawn[self.shots :]
            instruction = "Classify each question by the type of its answer.\n"
            prefix = "".join(f"Question: {text}\nType: {label}\n" for text, label in shown)
            probes = tuple(
                Probe(f"Question: {text}\nType:", target=f" {label}\n", history=f" {label}")
                for text, label in hidden
            )
            facts = {"shots": self.shots}
            yield Item(
                f"trec-{number}", instruction + prefix, instruction, probes, chat=False, facts=facts
            )
            number += 1
