"""What a task is: items to ask, how they are run, and what is measured. One short file each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import Measure
from kvhive.evaluation.protocols import Mode, ModelUnderTest, ask, converse
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Part, RecipeResult
from kvhive.registry import Registry
from kvhive.spec import Spec, knob, parse


@dataclass(frozen=True)
class Task(Spec):
    """Base of all tasks. Fields are knobs: `passkey(decoys=3)`.

    Class facts: `measures` (the first is the headline), `data` (data sets it reads), `modes`,
    `most_aware` (probes of an item that are run in mode "aware", where each costs a prompt of its
    own).
    """

    as_python: ClassVar[bool] = True  # recorded runs name their tasks so
    measures: ClassVar[tuple[Measure, ...]]
    data: ClassVar[tuple[str, ...]] = ()
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic", "aware")
    most_aware: ClassVar[int] = 2

    def items(self, desk: TaskContext) -> Iterator[Item]:
        """Items in a fixed order; may go on for ever, the runner takes the first few."""
        raise TypeError(f"{type(self).__name__} does not say what it asks")

    def run(self, asked: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """All recipes on one item."""
        return ask(asked, item, item.prefix, mode, self.most_aware)

    def floor(self, asked: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """The full cache without what the questions are about."""
        return ask(asked.only_full(), item, item.bare, mode, self.most_aware)[0]


@dataclass(frozen=True)
class Conversation(Task):
    """Base of tasks that ask several questions about one context, apart or in one conversation."""

    turns: bool = knob(False, "ask one after another on one cache, with the right answers between")

    def run(self, asked: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """Apart from each other, or as turns."""
        return self._play(asked, item, item.prefix, mode)

    def floor(self, asked: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """The same without the context."""
        return self._play(asked.only_full(), item, item.bare, mode)[0]

    def _play(
        self, asked: ModelUnderTest, item: Item, context: Part, mode: Mode
    ) -> list[RecipeResult]:
        way = converse if self.turns else ask
        return way(asked, item, context, mode, self.most_aware)


TASKS: Registry[Task] = Registry("task")


def parse_task(text: str) -> Task:
    """From "name" or "name(knob=value, ...)". Raises `ValueError` naming what is wrong."""
    return parse(TASKS, text)
