"""An engine without one: kvhive's own caches, one question after the other, in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvhive.evaluation.engine import Engine, Job, Question
from kvhive.evaluation.scoring import ModelRunner
from kvhive.model.loading import load
from kvhive.recipe import Recipe


class FakeKind:
    """log: what was asked of it, in order."""

    version = "1.2"
    device = "cpu"
    log: ClassVar[list[tuple[str, ...]]] = []

    def check(self, recipe: Recipe) -> None:
        """Runs all but one policy."""
        if recipe.policy.name == "tova":
            raise ValueError("fake cannot run tova")

    def start(self, job: Job) -> Engine:
        """Loads the model."""
        self.log.append(("start", str(job.recipe), *job.plugins))
        return FakeEngine(job)


class FakeEngine:
    """Stop strings are not its business: it goes on until an end, or the limit."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._runner = ModelRunner(load(job.model, dtype=job.dtype)[0])

    def write(self, questions: Sequence[Question]) -> list[list[int]]:
        """As `Engine.write`."""
        FakeKind.log.append(("write", str(self._job.recipe), str(len(questions))))
        return [self._answer(question) for question in questions]

    def close(self) -> None:
        """Note it."""
        FakeKind.log.append(("close", str(self._job.recipe)))

    def _answer(self, question: Question) -> list[int]:
        assert len(question.prompt) + question.limit <= self._job.tokens
        sequences = self._runner.read(question.prompt, [self._job.recipe])
        (answer,) = self._runner.generate(
            sequences, question.limit, lambda answer: answer[-1] in self._job.ends
        )
        return answer
