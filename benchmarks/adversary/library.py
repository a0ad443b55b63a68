"""Hostile calls of the library: wrong types, numbers and states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import kvhive
from benchmarks.adversary.case import Case
from kvhive.comparison.compare import compare
from kvhive.inference.generation import read
from tests.cli.tiny import model, tokenizer

WRONG: tuple[Any, ...] = (None, True, 1.5, -1, 0, 10**30, float("nan"), float("inf"), "x", "", b"x", [], {}, (1, 2),
                          np.int64(3), np.float32(0.5), np.nan, torch.tensor(3), torch.tensor([1.0]), object())  # fmt: skip


def cases() -> Iterator[Case]:
    """Each function with each wrong value in each of its places."""
    calls: dict[str, Callable[[Any], object]] = {
        "Budget(tokens=)": lambda value: kvhive.Budget(tokens=value),
        "Budget(share=)": lambda value: kvhive.Budget(share=value),
        "Budget.of()": kvhive.Budget.of,
        "Recipe.parse()": kvhive.Recipe.parse,
        "Recipe(slack=)": lambda value: kvhive.Recipe(kvhive.POLICIES["h2o"](), 40, slack=value),
        "Recipe(budget=)": lambda value: kvhive.Recipe(kvhive.POLICIES["h2o"](), value),
        "Recipe(policy=)": lambda value: kvhive.Recipe(value, 40),
        "load(name=)": kvhive.load,
        "load(dtype=)": lambda value: kvhive.load("smollm2", dtype=value),
        "load(device=)": lambda value: kvhive.load("smollm2", device=value),
        "for_model(model=)": lambda value: kvhive.HiveCache.for_model(value, "h2o@40"),
        "for_model(recipe=)": lambda value: kvhive.HiveCache.for_model(model(), value),
        "for_model(profile=)": lambda value: kvhive.HiveCache.for_model(model(), "h2o@40", profile=value),
        "make_room()": lambda value: _filled().make_room(value),
        "crop()": lambda value: _filled().crop(value),
        "compare(document=)": lambda value: _compare(document=value),
        "compare(questions=)": lambda value: _compare(questions=value),
        "compare(recipes=)": lambda value: _compare(recipes=value),
        "compare(max_new_tokens=)": lambda value: _compare(max_new_tokens=value),
        "compare(prefill_chunk=)": lambda value: _compare(prefill_chunk=value),
        "compare(mode=)": lambda value: _compare(mode=value),
        "read(ids=)": lambda value: read(model(), kvhive.HiveCache.for_model(model(), "h2o@40"), value),
    }  # fmt: skip
    for name, call in calls.items():
        for value in WRONG:
            yield Case(
                f"{name} with {value!r:.40}", lambda call=call, value=value: _called(call, value)
            )


def _called(call: Callable[[Any], object], value: Any) -> int:
    call(value)
    return 0


def _filled() -> kvhive.HiveCache:
    network = model()
    cache = kvhive.HiveCache.for_model(network, "h2o@40")
    read(network, cache, list(range(50)))
    return cache


def _compare(**options: Any) -> object:
    given = {
        "document": "a b c " * 30,
        "questions": ["why"],
        "recipes": ["h2o@40"],
        "max_new_tokens": 2,
    }
    return compare(model(), tokenizer(), **{**given, **options})
