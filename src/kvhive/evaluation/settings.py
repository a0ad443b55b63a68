"""What is to be run: model, recipes, tasks, modes, items, seed. Checked as a whole before anything
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvhive.evaluation.protocols import FULL
from kvhive.evaluation.tasks import Task, parse_tasks
from kvhive.inference.modes import MODES, QUESTION_MODES, Mode
from kvhive.plugins import load_plugins
from kvhive.recipe import Recipe

NONE = "none"  # the name of the floor among recipes: the full cache, without the context


@dataclass(frozen=True)
class Settings:
    """An evaluation, as values that can be written down and sent to workers.

    model, dtype, device: as for `kvhive.load`. recipes, tasks: spelled as on the command line; the
    full cache is added. modes: which of a task's modes to run; "stream" tasks know no question and
    run in any case. limit: items a task. data: a folder, "hub" or "builtin"; None asks
    `KVHIVE_DATA`. block: None reads prompts in one step; a number feeds them in blocks of so many
    tokens. hold: evict nothing after the prompt. threads: CPU threads of a worker; None leaves it
    to torch. plugins: files or modules that register tasks or methods of your own; every worker
    loads them.
    """

    model: str = "smollm2"
    recipes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("suite",)
    modes: tuple[str, ...] = QUESTION_MODES
    limit: int = 60
    seed: int = 0
    data: str | None = None
    block: int | None = None
    hold: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    plugins: tuple[str, ...] = ()

    def checked(self) -> Settings:
        """The same in normal form. Raises `ValueError` with one sentence for what cannot work.

        Loads the plugins.
        """
        load_plugins(self.plugins)
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1 item a task, got {self.limit}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")
        if not self.modes:
            raise ValueError(f"no mode was named; known: {', '.join(MODES)}")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        recipes = tuple(str(recipe) for recipe in self.parsed_recipes())
        tasks = tuple(str(task) for task in self.parsed_tasks())
        if not tasks:
            raise ValueError("no task was named")
        return replace(self, recipes=recipes, tasks=tasks)

    def parsed_recipes(self) -> list[Recipe]:
        """The full cache first, then every other recipe once."""
        recipes = [FULL, *(Recipe.parse(text) for text in self.recipes)]
        return list({str(recipe): recipe for recipe in recipes}.values())

    def parsed_tasks(self) -> list[Task]:
        """The tasks, each once."""
        return parse_tasks(list(self.tasks))

    def modes_of(self, task: Task) -> list[Mode]:
        """The modes in which this run asks a task: those wanted, or all it has if it has none of
        them.
        """
        wanted = [mode for mode in task.modes if mode in self.modes or mode == "stream"]
        return wanted or list(task.modes)

    def identity(self) -> dict[str, Any]:
        """What must agree for rows to belong to one run (data and plugins by their checksums, see
        `Evaluator.facts`).
        """
        values = asdict(self)
        del values["threads"], values["data"], values["plugins"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@dataclass(frozen=True)
class Unit:
    """One item of one task in one mode, run for all recipes: the smallest piece of work."""

    task: str
    mode: Mode
    number: int

    def __str__(self) -> str:
        return f"{self.task} {self.mode}, item {self.number}"


def units_done(rows: Sequence[dict[str, Any]], recipes: Sequence[str]) -> set[tuple[str, str, str]]:
    """(task, mode, item) of which there is a row for every recipe and for the floor."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        found.setdefault((row["task"], row["mode"], row["item"]), set()).add(row["recipe"])
    return {key for key, names in found.items() if names >= {*recipes, NONE}}
