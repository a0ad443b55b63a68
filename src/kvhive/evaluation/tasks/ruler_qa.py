"""RULER's question answering, on made-up people: facts that no model has read before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvhive.evaluation.data.made_up import people
from kvhive.evaluation.measures import CHOICE, F1, MARGIN, SUBSTRING
from kvhive.evaluation.tasks.base import TASKS, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_INSTRUCTION = "Answer the question based on the given documents.\n\n"


@TASKS.register("ruler_qa")
@dataclass(frozen=True)
class RulerQa(Task):
    """Short lives of made-up people; where was one of them born? Choice among ten birth places.

    Source: RULER, arXiv:2404.06654, section 3 (SQuAD and HotpotQA there); own text.
    """

    measures = (CHOICE, SUBSTRING, F1, MARGIN)

    tokens: int = knob(1024, "length of the context", least=1)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New people every time."""
        number = 0
        while True:
            rng = context.random("ruler_qa", number)
            crowd, passages, size = people(rng, 200), [], 0
            for one in crowd:
                passages.append(f"Document: {one.passage(rng)}")
                size += context.count(passages[-1]) + 1
                if size >= self.tokens:
                    break
            shown = crowd[: len(passages)]
            place = rng.randrange(len(shown))
            others = [one.town for one in shown if one is not shown[place]][:9]
            towns = rng.sample([shown[place].town, *others], 1 + len(others))
            probe = Probe(
                f"\n\nWhere was {shown[place].name} born?",
                cue=f"{shown[place].name} was born in",
                choices=tuple(f" {town}" for town in towns),
                gold=towns.index(shown[place].town),
                references=(shown[place].town,),
                limit=16,
                stop=("\n",),
                history=f" {shown[place].town}.",
            )
            prefix = _INSTRUCTION + "\n\n".join(passages)
            facts = {"length": self.tokens}
            yield Item(f"ruler_qa-{number}", prefix, _INSTRUCTION, (probe,), facts=facts)
            number += 1
