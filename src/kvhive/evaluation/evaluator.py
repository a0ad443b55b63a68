"""What a worker works with: the model, the recipes, every task's items; one unit at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from statistics import mean
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvhive import __version__
from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.data import open_source
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.row import ROW_SHAPE
from kvhive.evaluation.runner import Runner
from kvhive.evaluation.schema import check
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.settings import NONE, Settings, Unit, modes_of
from kvhive.evaluation.tasks import Conversation, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import CacheStats, Item, MeasureInput, RecipeResult
from kvhive.inference.generation import end_tokens
from kvhive.inference.modes import Mode
from kvhive.model.chat import ChatFormat
from kvhive.model.tokenizers import remember
from kvhive.plugins import load_plugins, told_as_plugins

Row = dict[str, Any]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Plan:
    """All units in order, the names of their items, what identifies the run, and notes for the
    user.
    """

    units: tuple[Unit, ...]
    names: Mapping[Unit, str]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


class Evaluator:
    """Everything a unit needs, made once. loaded: a model and tokenizer at hand; else loaded by
    name. runner: what runs the recipes; else the model itself does.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded | None = None,
        runner: Runner[Any] | None = None,
    ) -> None:
        self.settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.plugins = load_plugins(settings.plugins)
        self.source = open_source(settings.data)
        self.tasks = {str(task): task for task in settings.parsed_tasks()}
        self._check_data()
        self.model, tokenizer = loaded or _load(settings)
        remember(self.model, tokenizer)
        self.recipes = settings.parsed_recipes()
        for recipe in self.recipes:
            HiveCache.for_model(self.model, recipe)  # says now what cannot work with this model
        self.context = TaskContext(self.source, tokenizer, settings.seed)
        runner = runner or ModelRunner(self.model, settings.block, hold=settings.hold)
        ends = end_tokens(self.model, tokenizer)
        self.tested = ModelUnderTest(runner, ChatFormat.of(tokenizer), ends, tuple(self.recipes))
        self._items: dict[str, tuple[list[Item], int]] = {}

    def _check_data(self) -> None:
        """Before the model is loaded. Raises `ValueError` or `OSError` that says what to do."""
        for text, task in self.tasks.items():
            for name in task.data:
                try:
                    self.source.records(name)
                except ValueError as error:
                    raise ValueError(f"task {text}: {error}") from None

    # ---- the plan -------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What will be run. Raises `ValueError` for a task without any item that fits the model."""
        units: list[Unit] = []
        names: dict[Unit, str] = {}
        notes: dict[str, None] = {}
        for text, task in self.tasks.items():
            with told_as_plugins(type(task)):
                items, too_long = self._fitting(text)
            if too_long:
                most = f"more than the model's {self._most_tokens:,} tokens"
                notes[f"{text}: items left out, {most}: {too_long}"] = None
            if not items:
                why = "all are too long for the model" if too_long else "its data holds none"
                raise ValueError(f"task {text} has no items: {why}")
            found = len(items) + too_long
            if found < self.settings.limit:
                notes[f"{text}: items there are, fewer than the limit: {found}"] = None
            for name in task.data:
                notes.update(dict.fromkeys(self.source.notes(name)))
            for mode in modes_of(task, self.settings.modes):
                for number, item in enumerate(items):
                    unit = Unit(text, mode, number)
                    units.append(unit)
                    names[unit] = item.id
        return Plan(tuple(units), names, self.facts(), tuple(notes))

    def facts(self) -> dict[str, Any]:
        """What a reader needs to repeat the run: versions, model, data."""
        used = sorted({name for task in self.tasks.values() for name in task.data})
        config = self.model.config
        return {
            "kvhive": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "model_type": config.model_type,
            "model_sha256": self.model_hash,
            "data": {name: self.source.identity(name) for name in used},
            "plugin_sha256": self.plugins,
            "items": {text: len(items) for text, (items, _) in self._items.items()},
        }

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of names, shapes and bytes of all parameters."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
        return digest.hexdigest()

    @property
    def _most_tokens(self) -> int:
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    @property
    def longest(self) -> int:
        """The most tokens that any run of any item will have seen."""
        every = ((self.tasks[text], item) for text in self.tasks for item in self._fitting(text)[0])
        return max(self._tokens(task, item) for task, item in every)

    def _fitting(self, text: str) -> tuple[list[Item], int]:
        """A task's first items that fit the model, and how many were too long."""
        if text not in self._items:
            drawn = list(islice(self.tasks[text].items(self.context), self.settings.limit))
            names = Counter(item.id for item in drawn)
            if len(names) < len(drawn):
                twice = names.most_common(1)[0][0]
                raise ValueError(
                    f"task {text}: several items have the id {twice!r}; each needs one"
                )
            fits = [
                item for item in drawn if self._tokens(self.tasks[text], item) <= self._most_tokens
            ]
            self._items[text] = fits, len(drawn) - len(fits)
        return self._items[text]

    def _tokens(self, task: Task, item: Item) -> int:
        """The most tokens that any of the item's runs will have seen."""
        tested = self.tested
        sizes = []
        for probe in item.probes:
            answers = (tested.target(probe), *map(tested.chat.ids, probe.choices))
            longest = max(probe.limit, *map(len, answers))
            sizes.append(len(tested.query(item, probe)) + longest + len(tested.reply(item, probe)))
        talk = isinstance(task, Conversation) and task.turns
        return len(tested.prefix(item, item.prefix)) + (sum(sizes) if talk else max(sizes))

    # ---- the work -------------------------------------------------------------------------------

    def run(self, unit: Unit) -> list[Row]:
        """A row for every recipe and the floor. Raises what goes wrong, with the unit's name."""
        task, item = self._asked(unit)
        with _told_with(unit, task):
            *results, floor = _results(self.tested, task, item, unit.mode)
            full = results[0].outcomes
            return [self._row(unit, task, item, one, full, floor) for one in (*results, floor)]

    def results(self, unit: Unit) -> list[RecipeResult]:
        """What every recipe made of it, and the floor at last, not yet measured. Raises as
        `run`.
        """
        task, item = self._asked(unit)
        with _told_with(unit, task):
            return _results(self.tested, task, item, unit.mode)

    def _asked(self, unit: Unit) -> tuple[Task, Item]:
        return self.tasks[unit.task], self._fitting(unit.task)[0][unit.number]

    def _row(
        self,
        unit: Unit,
        task: Task,
        item: Item,
        one: RecipeResult,
        full: tuple[Any, ...],
        floor: RecipeResult,
    ) -> Row:
        given = MeasureInput(item, one.outcomes, full, floor.outcomes)
        columns: dict[str, Sequence[float | None]] = {
            measure.name: measure.values(given) for measure in task.measures
        }
        probes = []
        for place, (probe, outcome) in enumerate(zip(given.probes, one.outcomes, strict=True)):
            values = {name: column[place] for name, column in columns.items()}
            text = {} if outcome.text is None else {"text": outcome.text}
            probes.append({"scores": _rounded(values), "facts": dict(probe.facts), **text})
        means = {name: _mean(column) for name, column in columns.items()}
        row = {
            "task": unit.task,
            "mode": unit.mode,
            "item": item.id,
            "recipe": one.recipe,
            "cluster": item.cluster or item.id,
            "prefill": "whole" if self.settings.block is None else f"block {self.settings.block}",
            "decode": "hold" if self.settings.hold else "step",
            **_measured(one.start, one.end),
            "scores": _rounded(means),
            "probes": probes,
            "facts": dict(item.facts),
        }
        check(row, ROW_SHAPE, str(unit))
        return row


@contextmanager
def _told_with(unit: Unit, task: Task) -> Iterator[None]:
    try:
        with told_as_plugins(type(task)):
            yield
    except (ValueError, RuntimeError, MemoryError) as error:
        kinds = (ValueError, RuntimeError, MemoryError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{unit}: {error}") from error


def _results(tested: ModelUnderTest, task: Task, item: Item, mode: Mode) -> list[RecipeResult]:
    floor = dataclasses.replace(task.floor(tested, item, mode), recipe=NONE)
    return [*task.run(tested, item, mode), floor]


def _measured(start: CacheStats, end: CacheStats) -> dict[str, Any]:
    """Tokens and bytes when decoding began, and at its end."""
    return {
        "seen": start.seen,
        "kept": round(start.kept, 3),
        "bytes": start.nbytes,
        "full_bytes": start.full_nbytes,
        "seen_end": end.seen,
        "kept_end": round(end.kept, 3),
        "bytes_end": end.nbytes,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _rounded(values: Mapping[str, float | None]) -> dict[str, float]:
    """Six decimals, without what does not apply. Raises `ValueError` for what is no number."""
    known = {name: round(value, 6) for name, value in values.items() if value is not None}
    for name, value in known.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} came out as {value}: the model's outputs are not numbers")
    return known


def _load(settings: Settings) -> Loaded:
    from kvhive.model.loading import load

    return load(settings.model, dtype=settings.dtype, device=settings.device)
