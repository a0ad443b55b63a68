"""What a task is: items to ask, how they are run, and what is measured. One short file each."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_type_hints

from kvhive.evaluation.measures import Measure
from kvhive.evaluation.protocols import Mode, ModelUnderTest, ask, converse
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Part, RecipeResult
from kvhive.registry import Registry, did_you_mean


def knob(
    default: Any,
    meaning: str,
    *,
    least: int | float = 1,
    most: int | float = math.inf,
    among: tuple[str, ...] = (),
) -> Any:
    """A task's setting. least, most: the range of a number, or of every number of a list; among:
    the texts it may be.
    """
    rule = {"least": least, "most": most, "among": among}
    return field(default=default, metadata={"meaning": meaning, **rule})


@dataclass(frozen=True)
class Task:
    """Base of all tasks. Fields are knobs: `passkey(decoys=3)`.

    Class facts: `measures` (the first is the headline), `data` (data sets it reads), `modes`,
    `most_aware` (probes of an item that are run in mode "aware", where each costs a prompt of its
    own).
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    data: ClassVar[tuple[str, ...]] = ()
    modes: ClassVar[tuple[Mode, ...]] = ("agnostic", "aware")
    most_aware: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Raises `ValueError` for a knob outside its range."""
        for one in fields(self):
            _check_range(self.name, one.name, getattr(self, one.name), one.metadata)

    def items(self, desk: TaskContext) -> Iterator[Item]:
        """Items in a fixed order; may go on for ever, the runner takes the first few."""
        raise TypeError(f"{type(self).__name__} does not say what it asks")

    def run(self, asked: ModelUnderTest, item: Item, mode: Mode) -> list[RecipeResult]:
        """All recipes on one item."""
        return ask(asked, item, item.prefix, mode, self.most_aware)

    def floor(self, asked: ModelUnderTest, item: Item, mode: Mode) -> RecipeResult:
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
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        name, keywords = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
        knobs = {str(one.arg): ast.literal_eval(one.value) for one in keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"task {text!r}: the form is name(knob=value, ...)") from None
    if not isinstance(name, ast.Name) or (isinstance(tree, ast.Call) and tree.args):
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
    if hint in _KINDS:
        types, words = _KINDS[hint]
        if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{task}: {name} must be {words}, got {value!r}")
    elif not isinstance(value, tuple) or not value:
        raise ValueError(f"{task}: {name} must be a list like (1, 2), or (1,), got {value!r}")
    else:
        for one in value:
            _check_kind(task, f"every one of {name}", one, get_args(hint)[0])


def _check_range(task: str, name: str, value: Any, rule: Mapping[str, Any]) -> None:
    """A number, every number of a tuple, or a text, against what `knob` says of it."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str) and rule.get("among") and one not in rule["among"]:
            raise ValueError(f"{task}: {name} must be one of {rule['among']}, got {one!r}")
        if isinstance(one, int | float) and not isinstance(one, bool):
            least, most = rule.get("least", -math.inf), rule.get("most", math.inf)
            if not least <= one <= most:
                words = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise ValueError(f"{task}: {name} must be {words}, got {one}")
