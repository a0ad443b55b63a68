"""Sweep: the smallest budget of a recipe that stays within a loss, found by bisection.

The loss is the KL divergence that `compare` measures: on the full cache's answers to the questions.
The full cache runs once; every budget tried reads the document anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from kvhive.budget import Budget
from kvhive.comparison.result import Result
from kvhive.comparison.run import REFERENCE, Comparison, Generated, Progress
from kvhive.inference.modes import QuestionMode
from kvhive.inference.prompt import Prompt
from kvhive.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Unit = Literal["share", "tokens"]
STEP_SHARE, STEP_TOKENS = 0.01, 16


@dataclass(frozen=True)
class Probe:
    """One budget that was tried: its run, and the KL divergence it had, in nats."""

    recipe: Recipe
    result: Result
    kl: float


@dataclass(frozen=True)
class Sweep:
    """What bisection found for one recipe.

    recipe: as given, keeping everything until a budget is found. probes: in the order they were
    tried. found: the smallest budget tried that is within the loss, and whose larger neighbour was
    tried too or is the largest; None: not even the largest one is within.
    """

    recipe: Recipe
    limit: float
    probes: tuple[Probe, ...]
    found: Probe | None

    @property
    def rises(self) -> list[tuple[Probe, Probe]]:
        """Pairs of budgets, neighbours among those tried, of which the larger lost more: bisection
        takes loss to fall as budgets grow, so a smaller one may do where there are any.
        """
        ordered = sorted(self.probes, key=lambda probe: _size(probe.recipe))
        pairs = pairwise(ordered)
        return [(small, large) for small, large in pairs if large.kl > small.kl]


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    questions: Sequence[str],
    recipes: Sequence[Recipe | str],
    kl: float,
    *,
    unit: Unit = "share",
    max_new_tokens: int = 64,
    mode: QuestionMode = "agnostic",
    turns: bool = False,
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
    tried: Callable[[Probe], None] | None = None,
) -> tuple[Result, list[Sweep]]:
    """The full cache's run, and for each of `recipes` (without budgets) the smallest budget whose
    mean KL divergence is at most `kl` nats.

    unit: budgets are shares of the tokens seen, in steps of 1 %, or counts in steps of 16 tokens,
    up to the whole document; a share or count that the policy cannot work with is not tried. tried:
    called with every budget as soon as it was measured. All else as in `compare`.

    Raises `ValueError` for a negative loss, a recipe that takes no budget or names one, and a
    document that is too long for a full cache to compare with.
    """
    if not kl >= 0:
        raise ValueError(f"sweep: kl must be at least 0 nats, got {kl}")
    if not recipes:
        raise ValueError("sweep: give at least one recipe")
    free = [_free(recipe) for recipe in recipes]
    prompt = Prompt.build(tokenizer, document, list(questions), turns)
    asked = tuple(questions)
    comparison = Comparison(
        model, tokenizer, prompt, asked, max_new_tokens, mode, prefill_chunk, progress
    )
    if not comparison.fits(REFERENCE):
        raise ValueError(
            f"the document and an answer ({prompt.longest(max_new_tokens):,} + {max_new_tokens:,} "
            "tokens) are longer than the model was trained on, so there is no full cache to "
            "measure a loss against: give a part of it"
        )
    comparison.order(free)
    comparison.warm_up()
    reference, answers = comparison.run(REFERENCE, None)
    seen = reference.report.tokens_seen
    found = []
    for recipe in free:
        budgets = _budgets(recipe, unit, seen)
        found.append(_bisect(comparison, answers, recipe, budgets, kl, tried))
    return reference, found


def _free(recipe: Recipe | str) -> Recipe:
    free = Recipe.without_budget(recipe)
    if free.budget is None:
        raise ValueError(f"sweep: {free} takes no budget, so there is none to look for")
    return free


def _budgets(recipe: Recipe, unit: Unit, seen: int) -> list[Budget]:
    """All budgets that may be tried, ascending; the last keeps the whole document."""
    least = recipe.policy.sizing.least + (recipe.slack or 0)
    if unit == "tokens":
        counts = [*range(-(-least // STEP_TOKENS) * STEP_TOKENS, seen, STEP_TOKENS)]
        return [Budget(tokens=count) for count in [*counts, max(seen, least)]]
    shares = [round(step * STEP_SHARE, 2) for step in range(1, round(1 / STEP_SHARE) + 1)]
    larger = [
        share for share in shares if Budget(share=share).resolve(seen, least) < share * seen + 1
    ]
    return [Budget(share=share) for share in larger or shares[-1:]]


def _bisect(
    comparison: Comparison,
    reference: list[Generated],
    recipe: Recipe,
    budgets: list[Budget],
    limit: float,
    tried: Callable[[Probe], None] | None,
) -> Sweep:
    """The largest budget first, then halves of what is left."""
    probes: list[Probe] = []

    def probe(place: int) -> Probe:
        one = replace(recipe, budget=budgets[place])
        result, _ = comparison.run(one, reference)
        assert result.fidelity is not None
        probes.append(Probe(one, result, result.fidelity.kl))
        if tried is not None:
            tried(probes[-1])
        return probes[-1]

    best = probe(len(budgets) - 1)
    if best.kl > limit:
        return Sweep(recipe, limit, tuple(probes), None)
    low, high = 0, len(budgets) - 1
    while low < high:
        middle = (low + high) // 2
        now = probe(middle)
        if now.kl <= limit:
            best, high = now, middle
        else:
            low = middle + 1
    return Sweep(recipe, limit, tuple(probes), best)


def _size(recipe: Recipe) -> float:
    assert recipe.budget is not None
    return float(recipe.budget.tokens or recipe.budget.share or 0)
