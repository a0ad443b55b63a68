"""What is to be run: model, recipes, tasks, modes, items, seed. Checked as a whole before anything
runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvhive.evaluation.engine import TRANSFORMERS, find_engine
from kvhive.evaluation.protocols import FULL
from kvhive.evaluation.tasks import Task, is_group, parse_tasks
from kvhive.inference.modes import MODES, Mode
from kvhive.plugins import load_plugins
from kvhive.recipe import Recipe
from kvhive.spec import Knob

_BOUNDS = (
    Knob("limit", int, 60, least=1, most=10**6),
    Knob("seed", int, 0, least=0, most=2**63 - 1),
    Knob("block", int | None, None, least=1, most=2**31 - 1),
    Knob("threads", int | None, None, least=1, most=1024),
)
# What an engine has no counterpart of, as on the command line, and why.
_TRANSFORMERS_ONLY = {
    "hold": ("--hold", "it goes on evicting while it writes"),
    "block": ("--prefill-block", "it compresses a prompt once it has been read whole"),
    "threads": ("--threads", "it has settings of its own for them"),
}
NONE = "none"  # the name of the floor among recipes: the full cache, without the context


@dataclass(frozen=True)
class Settings:
    """An evaluation, as values that can be written down and sent to workers.

    model, dtype, device: as for `kvhive.load`. recipes, tasks: spelled as on the command line; the
    full cache is added. modes: which of a task's modes to run. limit: items a task. data: a folder,
    "hub" or "builtin"; None asks `KVHIVE_DATA`, and without it only tasks that need none run.
    block: None reads prompts in one step; a number feeds them in blocks of so many tokens. hold:
    evict nothing after the prompt. threads: CPU threads of a worker; None leaves it to torch.
    plugins: files or modules that register tasks or methods of your own; every worker loads them.
    engine: who runs the model, "transformers" or an installed engine, which can do less:
    mode "aware" and tasks that are answered in writing alone.
    """

    model: str = "smollm2"
    recipes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("suite",)
    modes: tuple[str, ...] = MODES
    limit: int = 60
    seed: int = 0
    data: str | None = None
    block: int | None = None
    hold: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    plugins: tuple[str, ...] = ()
    engine: str = TRANSFORMERS

    def checked(self) -> Settings:
        """The same in normal form. Raises `ValueError` with one sentence for what cannot work.

        Loads the plugins. Tasks of a group that have none of the modes are left out: see `notes`.
        """
        load_plugins(self.plugins)
        for knob in _BOUNDS:
            knob.check("evaluate", getattr(self, knob.name))
        if not self.modes:
            raise ValueError(f"no mode was named; known: {', '.join(MODES)}")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        if self.engine != TRANSFORMERS:
            self._check_engine()
        recipes = tuple(str(recipe) for recipe in self.parsed_recipes())
        tasks = tuple(str(task) for task in self._chosen()[0])
        if not tasks:
            raise ValueError("no task was named")
        return replace(self, recipes=recipes, tasks=tasks)

    def _check_engine(self) -> None:
        find_engine(self.engine)
        for mode in self.modes:
            if mode != "aware":
                raise ValueError(
                    f"mode {mode} cannot be measured through {self.engine}, which compresses a "
                    "prompt once it has been read whole, question and all; give --mode aware"
                )
        for name, (option, why) in _TRANSFORMERS_ONLY.items():
            if getattr(self, name):
                raise ValueError(f"{option} is nothing for {self.engine}: {why}; leave it out")

    def notes(self) -> list[str]:
        """What `checked` leaves out."""
        return [_no_mode(task, self.modes) + "; it is left out" for task in self._chosen()[1]]

    def _chosen(self) -> tuple[list[Task], list[Task]]:
        """The tasks to run, each once, and those of groups that have none of the modes.

        Raises `ValueError` for a task named by itself that has none, and where nothing is left.
        """
        chosen: dict[str, Task] = {}
        left_out: dict[str, Task] = {}
        for text in self.tasks:
            for task in parse_tasks([text]):
                if modes_of(task, self.modes):
                    chosen[str(task)] = task
                elif is_group(text):
                    left_out[str(task)] = task
                else:
                    raise ValueError(_no_mode(task, self.modes))
        if left_out and not chosen:
            raise ValueError(
                f"no task of {', '.join(self.tasks)} has the mode {' or '.join(self.modes)}"
            )
        return list(chosen.values()), list(left_out.values())

    def parsed_recipes(self) -> list[Recipe]:
        """The full cache first, then every other recipe once."""
        recipes = [FULL, *(Recipe.parse(text) for text in self.recipes)]
        return list({str(recipe): recipe for recipe in recipes}.values())

    def parsed_tasks(self) -> list[Task]:
        """The tasks, each once."""
        return parse_tasks(list(self.tasks))

    def identity(self) -> dict[str, Any]:
        """What must agree for rows to belong to one run (data and plugins by their checksums, see
        `Evaluator.facts`).
        """
        values = asdict(self)
        del values["threads"], values["data"], values["plugins"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def modes_of(task: Task, wanted: Collection[str]) -> list[Mode]:
    """Which of a task's modes are among those wanted."""
    return [mode for mode in task.modes if mode in wanted]


def _no_mode(task: Task, wanted: Sequence[str]) -> str:
    has = " and ".join(task.modes)
    return f"task {task} has no mode {' or '.join(wanted)}; it has {has}"


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
