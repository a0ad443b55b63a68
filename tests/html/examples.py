"""Made-up results: every kind of page without a model."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from kvhive.cache.report import Report
from kvhive.calibration import Profile
from kvhive.comparison.result import Answer, Fidelity, Result
from kvhive.comparison.results import Results
from kvhive.comparison.shading import Word
from kvhive.comparison.survivors import Survivors
from kvhive.evaluation.report.page import report_page as evaluation_page
from kvhive.evaluation.report.run import Run
from kvhive.html.kept import kept_page
from kvhive.html.profile import profile_page
from kvhive.html.report import report_page as compare_page
from kvhive.learning import Picture

RECIPES = ("full", "buzz@0.2", "buzz@0.4", "h2o(recent=20)@0.2", "h2o(recent=20)@0.4", "tova@90")
TASKS = ("passkey(lengths=(300, 500), depths=(0.0, 1.0))", "shared_context(asked=3, turns=True)")
MEASURES = dict(zip(TASKS, ("exact", "centred_choice"), strict=True))
LAYERS, HEADS, SEEN = 4, 2, 120


def results() -> Results:
    """The full cache and two recipes, on two questions."""
    return Results(_result(place, name) for place, name in enumerate(RECIPES[:3]))


def words() -> list[Word]:
    """A short document; one word was lost, one has several tokens."""
    return [Word("honey", 1.0, 1), Word(" ", None, 1), Word("comb", 0.0, 1), Word("bee", 0.4, 2)]


def tokens() -> list[str]:
    """The text of every token seen."""
    return [f"w{place} " for place in range(SEEN)]


def run(recipes: tuple[str, ...] = RECIPES) -> Run:
    """Two tasks in two modes: one with lengths and depths, one with turns."""
    rows = [
        _row(task, mode, recipe, place, item)
        for task in TASKS
        for mode in ("agnostic", "aware")
        for place, recipe in enumerate([*recipes, "none"])
        for item in range(8)
    ]
    settings = {
        **{"model": "tiny", "dtype": "float32", "recipes": list(recipes), "tasks": list(TASKS)},
        **{"modes": ["agnostic", "aware"], "limit": 8, "seed": 0, "block": None, "hold": True},
    }
    facts = {"kvhive": "0", "data": {"books": "sha256:0"}, "model_sha256": "0"}
    return Run.made_of("made up", settings, facts, rows, [])


def profile() -> Profile:
    """Of which only the origin is shown."""
    return Profile("zigzag", "0" * 64, "texts", "2026-11-28", {})


def pictures() -> tuple[Picture, ...]:
    """A narrow one, and one that is wider than a phone."""
    values = torch.rand(LAYERS, 12, generator=torch.Generator().manual_seed(0))
    titles = tuple(f"head {place}" for place in range(12))
    return Picture("shares", titles[:2], values[:, :2], ".1%"), Picture("needs", titles, values)


def pages(spoil: Any = lambda value: value) -> dict[str, str]:
    """All pages. spoil: what is done to every value they are made of."""
    found, survivors = spoil(results()), results()[1].survivors
    command = spoil("kvhive a b")
    facts, notes, texts = (spoil([one]) for one in ("a fact", "a note", "a token"))
    name, shaded, report = spoil("a document"), spoil(words()), found[1].report
    return {
        "compare": compare_page(found, name, facts, notes, texts * SEEN, command),
        "show": kept_page(shaded, texts * SEEN, survivors, report, name, facts, command),
        "evaluation": evaluation_page(spoil(run()), command),
        "profile": profile_page(spoil(profile()), spoil(pictures()), name, spoil("h2o"), command),
    }


def spoiled(payload: str) -> Any:
    """A function that appends `payload` to every text within a value, keys included.

    The names of the full cache and the floor stay, and so do words that are part of the format.
    """
    keep = {"full", "none", "share", "model", "dtype", "seed", "recipes"}
    keep |= {"task", "mode", "item", "recipe", "kept", "bytes", "scores", "probes", "facts", "text"}
    keep |= {"turn", "length", "depth", ".1%", ".2f"}

    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return value if value in keep else value + payload
        if isinstance(value, dict):
            return {spoil(key): spoil(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(spoil(one) for one in value)
        if is_dataclass(value) and not isinstance(value, type):
            changed = {one.name: spoil(getattr(value, one.name)) for one in fields(value)}
            return replace(value, **changed)
        return value

    return spoil


def _result(place: int, recipe: str) -> Result:
    generator = torch.Generator().manual_seed(place)
    kept = torch.rand(LAYERS * HEADS, SEEN, generator=generator) < 1 - 0.3 * place
    report = Report(
        recipe=recipe,
        positions="original",
        layers=tuple(range(LAYERS)),
        seen=torch.tensor([SEEN]),
        kept=kept.view(LAYERS, 1, HEADS, SEEN).sum(-1),
        nbytes=2**20 * (4 - place),
        full_nbytes=2**22,
    )
    answers = (Answer("Who?", "the bee", (1, 2)), Answer("Why?", "the " + "fly" * place, (place,)))
    rows = tuple((layer, head) for layer in range(LAYERS) for head in range(HEADS))
    fidelity = Fidelity(0.2 * place, 1 - 0.2 * place, 40)
    return Result(recipe, not place, answers, report, Survivors(kept, rows), 1.0, 9.0, fidelity)


def _row(task: str, mode: str, recipe: str, place: int, item: int) -> dict[str, Any]:
    score = float((item * 7 + place * 3) % 8 >= place) if recipe != "none" else 0.0
    turns = {"turn": 1 + item % 3} if task == TASKS[1] else {}
    where = {"length": 300 + 200 * (item % 2), "depth": float(item // 2 % 2)}
    probes = [
        {
            "scores": {MEASURES[task]: score},
            "facts": {"turn": turn} if turns else {},
            "text": "an answer",
        }
        for turn in ((1, 2, 3) if turns else (1,))
    ]
    return {
        **{"task": task, "mode": mode, "item": f"item{item}", "recipe": recipe, "cluster": "c"},
        **{"prefill": "whole", "decode": "hold", "seen": 500, "kept": 500.0 - 60 * place},
        **{
            "bytes": 10**6 * (8 - place),
            "full_bytes": 8 * 10**6,
            "scores": {MEASURES[task]: score},
        },
        **{"probes": probes, "facts": where if task == TASKS[0] else {"told": "by hand"}},
    }
