"""Verbatim recall: go on copying a passage read before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import NLL, TOKEN_ACCURACY
from kvhive.evaluation.tasks.base import TASKS, InText
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.inference.modes import Mode
from kvhive.spec import knob


@TASKS.register("verbatim")
@dataclass(frozen=True)
class Verbatim(InText):
    """Some tokens of a text; then 16 of them again, and the 32 that followed are scored.

    The cheapest probe of what a cache still holds: 32 graded answers a cue, several cues a prompt,
    and no skill needed but copying. Mode "agnostic" only: with the cue in the prompt, policies that
    watch its end would know where to look.
    """

    measures = (TOKEN_ACCURACY, NLL)
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic",)

    tokens: int = knob(1024, "tokens of the text", least=1)
    cue: int = knob(16, "tokens copied to say where", least=1)
    answer: int = knob(32, "tokens scored", least=1)
    depths: tuple[float, ...] = knob(
        (0.1, 0.3, 0.5, 0.7, 0.9), "where the cues lie", least=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2 * (self.cue + self.answer):
            raise ValueError(
                f"verbatim: tokens must be at least twice cue + answer, got tokens={self.tokens}, "
                f"cue={self.cue}, answer={self.answer}"
            )

    def items(self, context: TaskContext) -> Iterator[Item]:
        """A new passage every time."""
        break_ids = context.ids("\n\n")
        number = 0
        while True:
            passage = context.passage(context.random("verbatim", number), self.tokens, self.hay)
            probes = []
            for depth in self.depths:
                start = round(depth * (self.tokens - self.cue - self.answer))
                stop = start + self.cue
                query = (*break_ids, *passage[start:stop])
                answer = passage[stop : stop + self.answer]
                probes.append(Probe(query, target=answer, facts={"depth": depth}))
            facts = {"length": self.tokens}
            yield Item(f"verbatim-{number}", passage, (), tuple(probes), chat=False, facts=facts)
            number += 1
