"""Workers that are requests of one engine: many units at once, each recipe after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvhive.evaluation.engine import Engine, EngineKind, Job, find_engine
from kvhive.evaluation.engine_runner import EngineRunner, token_bytes
from kvhive.evaluation.evaluator import Evaluator, Plan, Row
from kvhive.evaluation.settings import Settings, Unit
from kvhive.evaluation.workers import Died, Failed, Reply, Worker
from kvhive.model.loading import folder_or_hub, load
from kvhive.recipe import Recipe

AT_ONCE = 64  # units whose rows are written together: what a run that is stopped may lose


@dataclass(eq=False)
class Place:
    """A place in the batch."""

    unit: Unit | None = None

    def send(self, unit: Unit | None) -> None:
        """Take the place."""
        self.unit = unit

    def stop(self) -> None:
        """Nothing: the engine is the pool's."""


class EnginePool:
    """An evaluator here, which makes the questions and scores the answers, and an engine.

    One engine is open at a time; a batch begins with the recipe whose engine that is. Raises
    `ValueError` for a recipe that the engine cannot run, and for another device than its own.
    """

    size = AT_ONCE
    notes: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        self._settings, self._kind = settings, find_engine(settings.engine)
        self._model = folder_or_hub(settings.model)
        _check(self._kind, settings)
        loaded = load(settings.model, dtype=settings.dtype)
        self._runner = EngineRunner(settings.engine, token_bytes(loaded[0]))
        self._evaluator = Evaluator(settings, loaded, self._runner)
        self._replies: dict[Worker, list[Row]] = {}
        self._open: tuple[str, Engine] | None = None

    def start(self) -> Place:
        """One more place in the batch."""
        return Place()

    def wait(self, busy: Sequence[Worker]) -> tuple[Worker, Reply | Failed | Died]:
        """The plan, or the next of the batch; where none is left, all that wait are the next."""
        places = [one for one in busy if isinstance(one, Place)]
        if places[0].unit is None:
            return places[0], self._plan()
        if not self._replies:
            units = [one.unit for one in places if one.unit is not None]
            self._replies = dict(zip(places, self._rows(units), strict=True))
        place = next(iter(self._replies))
        return place, self._replies.pop(place)

    def close(self) -> None:
        """Close the engine that is open."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def _plan(self) -> Plan:
        """Raises `ValueError` for a task that asks for more than answers."""
        plan = self._evaluator.plan()
        for unit in {unit.task: unit for unit in reversed(plan.units)}.values():
            self._evaluator.results(unit)
        facts = {**plan.facts, "engine": f"{self._settings.engine} {self._kind.version}"}
        return replace(plan, facts=facts)

    def _rows(self, units: Sequence[Unit]) -> list[list[Row]]:
        runner = self._runner
        runner.asked, runner.answers = {}, {}
        for unit in units:
            self._evaluator.results(unit)
        for recipe in sorted(runner.asked, key=self._is_closed):
            questions = list(runner.asked[recipe])
            answers = self._engine(recipe).write(questions)
            for question, answer in zip(questions, answers, strict=True):
                runner.answers[recipe, question] = answer
        return [self._evaluator.run(unit) for unit in units]

    def _is_closed(self, recipe: str) -> bool:
        return self._open is None or self._open[0] != recipe

    def _engine(self, recipe: str) -> Engine:
        if self._open is None or self._open[0] != recipe:
            self.close()
            evaluator = self._evaluator
            job = Job(
                self._model,
                self._settings.dtype,
                Recipe.parse(recipe),
                evaluator.tested.ends,
                evaluator.longest,
                self._settings.plugins,
            )
            self._open = recipe, self._kind.start(job)
        return self._open[1]


def _check(kind: EngineKind, settings: Settings) -> None:
    if settings.device != kind.device:
        raise ValueError(
            f"{settings.engine} runs on {kind.device} here, not on {settings.device}: give "
            f"--device {kind.device}"
        )
    for recipe in settings.parsed_recipes():
        kind.check(recipe)
