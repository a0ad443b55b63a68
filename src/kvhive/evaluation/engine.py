"""Engines that answer in the place of transformers: what one must do, and how it is found by name.

An engine comes with a package of its own, which names it among the entry points `kvhive.engines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from kvhive.recipe import Recipe

TRANSFORMERS = "transformers"  # no engine: the model at hand, its caches kvhive's own
GROUP = "kvhive.engines"


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, and how many tokens the answer may have."""

    prompt: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Job:
    """What an engine is started for.

    model: a folder, or a hub id. dtype: as for `kvhive.load`. ends: ids after which an answer is
    over. tokens: of the longest question and its answer together. plugins: files or modules that
    the recipe may come from.
    """

    model: str
    dtype: str
    recipe: Recipe
    ends: frozenset[int]
    tokens: int
    plugins: tuple[str, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """One model with one recipe. It compresses a prompt once it has been read whole."""

    def write(self, questions: Sequence[Question]) -> list[list[int]]:
        """Greedy answers, one for each question: at least one token, at most its `limit`; the first
        of the job's `ends` is the last.
        """

    def close(self) -> None:
        """Give everything back."""


@runtime_checkable
class EngineKind(Protocol):
    """What an entry point names: an object, made of nothing, that starts engines."""

    @property
    def version(self) -> str:
        """Of the engine, for who wants to repeat a run."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda"."""

    def check(self, recipe: Recipe) -> None:
        """Raises `ValueError` with one sentence for a recipe that it cannot run."""

    def start(self, job: Job) -> Engine:
        """A new engine. Raises `ValueError` or `RuntimeError` where it cannot be started."""


def find_engine(name: str) -> EngineKind:
    """The engine of that name. Raises `ValueError` that says what to install if there is none, and
    `ImportError` where it is broken.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join([TRANSFORMERS, *sorted(found)])
        raise ValueError(
            f"no engine {name!r} is installed; there is {known}; for vllm: pip install kvhive-vllm"
        )
    kind: EngineKind = found[name].load()()
    return kind
