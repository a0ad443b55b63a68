"""What a task is: items to ask, how they are run, and what is measured. One short file each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

from kvhive.evaluation.asking import Asked, Mode, ask, converse
from kvhive.evaluation.desk import Desk
from kvhive.evaluation.items import Item, Part, Performance
from kvhive.evaluation.measures import Measure
from kvhive.policies.base import knob
from kvhive.registry import Registry, did_you_mean


@dataclass(frozen=True)
class Task:
    """Base of all tasks. Fields are knobs: `passkey(tokens=2048)`.

    Class facts: `measures` (the first is the headline), `data` (data sets it reads), `modes`,
    `most_aware` (probes of an item that are run in mode "aware", where each costs a prompt of its
    own).
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    data: ClassVar[tuple[str, ...]] = ()
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic", "aware")
    most_aware: ClassVar[int] = 2

    def items(self, desk: Desk) -> Iterator[Item]:
        """Items in a fixed order; may go on for ever, the runner takes the first few."""
        raise TypeError(f"{type(self).__name__} does not say what it asks")

    def run(self, asked: Asked, item: Item, mode: Mode) -> list[Performance]:
        """All recipes on one item."""
        return ask(asked, item, item.prefix, mode, self.most_aware)

    def floor(self, asked: Asked, item: Item, mode: Mode) -> Performance:
        """The full cache without what the questions are about."""
        return ask(asked.only_full(), item, item.bare, mode, self.most_aware)[0]

    def __str__(self) -> str:
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if getattr(self, one.name) != one.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True)
class Conversation(Task):
    """Base of tasks that ask several questions about one context, apart or in one conversation."""

    turns: bool = knob(False, "ask one after another on one cache, with the right answers between")

    def run(self, asked: Asked, item: Item, mode: Mode) -> list[Performance]:
        """Apart from each other, or as turns."""
        return self._play(asked, item, item.prefix, mode)

    def floor(self, asked: Asked, item: Item, mode: Mode) -> Performance:
        """The same without the context."""
        return self._play(asked.only_full(), item, item.bare, mode)[0]

    def _play(self, asked: Asked, item: Item, context: Part, mode: Mode) -> list[Performance]:
        way = converse if self.turns else ask
        return way(asked, item, context, mode, self.most_aware)


TASKS: Registry[Task] = Registry("task")


def parse_task(text: str) -> Task:
    """From "name" or "name(knob=value, ...)". Raises `ValueError` naming what is wrong."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        name, keywords = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
        knobs = {str(one.arg): ast.literal_eval(one.value) for one in keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"task {text!r}: the form is name(knob=value, ...)") from None
    if not isinstance(name, ast.Name):
        raise ValueError(f"task {text!r}: the form is name(knob=value, ...)")
    cls = TASKS[name.id]
    known = [one.name for one in fields(cls)]
    hints = get_type_hints(cls)
    for knob_name, value in knobs.items():
        if knob_name not in known:
            hint = did_you_mean(knob_name, known) if known else "it has none"
            raise ValueError(f"{name.id} has no knob {knob_name!r}; {hint}")
        _check_kind(name.id, knob_name, value, hints[knob_name])
    return cls(**knobs)


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "True or False"),
    str: ((str,), "a text in quotes"),
}


def _check_kind(task: str, name: str, value: Any, hint: Any) -> None:
    """Knobs of tasks are numbers, texts, flags, and tuples."""
    types, words = _KINDS.get(hint, ((tuple,), "a list like (1, 2)"))
    if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{task}: {name} must be {words}, got {value!r}")
