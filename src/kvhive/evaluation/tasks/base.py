"""What a task is: items to ask, how they are run, and what is measured. One short file each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.measures import Measure
from kvhive.evaluation.protocols import ModelUnderTest, ask, converse
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, RecipeResult
from kvhive.inference.modes import Mode
from kvhive.model.chat import Part
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

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Items in a fixed order; may go on for ever, a run takes the first few."""
        raise TypeError(f"{type(self).__name__} does not say what it asks")

    def run(self, tested: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """All recipes on one item."""
        return ask(tested, item, item.prefix, mode, self.most_aware)

    def floor(self, tested: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """The full cache without what the questions are about."""
        return ask(tested.only_full(), item, item.bare, mode, self.most_aware)[0]


@dataclass(frozen=True)
class Conversation(Task):
    """Base of tasks that ask several questions about one context, apart or in one conversation."""

    turns: bool = knob(False, "ask one after another on one cache, with the right answers between")

    def run(self, tested: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """Apart from each other, or as turns."""
        return self._run(tested, item, item.prefix, mode)

    def floor(self, tested: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
        """The same without the context."""
        return self._run(tested.only_full(), item, item.bare, mode)[0]

    def _run(
        self, tested: ModelUnderTest, item: Item, part: Part, mode: Mode
    ) -> list[RecipeResult]:
        way = converse if self.turns else ask
        return way(tested, item, part, mode, self.most_aware)


@dataclass(frozen=True)
class InText(Task):
    """Base of tasks that hide what they ask in a long text, of a book or made up."""

    hay: str = knob("book", "text around; 'prose': made up, needs no data", among=("book", "prose"))

    @property
    def data(self) -> tuple[str, ...]:  # type: ignore[override]
        """Books, where the text is one."""
        return ("books",) if self.hay == "book" else ()


TASKS: Registry[Task] = Registry("task")


def parse_task(text: str) -> Task:
    """From "name" or "name(knob=value, ...)". Raises `ValueError` naming what is wrong."""
    return parse(TASKS, text)
