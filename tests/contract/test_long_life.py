"""2,000 generated tokens after a long prompt: what holds after a few steps still holds then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.recipe import Recipe
from tests.contract.recipes import SELECTIVE, fullest, guarding, limit
from tests.support import Feeder

PROMPTS, DECODED = (300, 190), 2000
EVERY = 97  # steps between two thorough checks
POLICIES = {Recipe.parse(recipe).policy.name: recipe for recipe in reversed(SELECTIVE)}
RECIPES = [guarding(recipe) or Recipe.parse(recipe) for recipe in POLICIES.values()]  # no variants


class Grouped(Feeder):
    """Two query heads to a KV head (GQA)."""

    length = max(PROMPTS) + DECODED
    decoded = DECODED


class Single(Grouped):
    """A KV head of its own for every query head (MHA)."""

    kv_heads = Feeder.heads
    decoded = 600


@pytest.mark.parametrize("kind", [Grouped, Single])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_long_life(kind: type[Grouped], recipe: Recipe) -> None:
    """Two rows, one of them padded, which does as it does alone."""
    assert recipe.budget is not None
    assert recipe.budget.tokens is not None
    policy, tokens = recipe.policy, recipe.budget.tokens
    batch, alone = kind(recipe, tapes=(0, 1)), kind(recipe, tapes=(1,))
    batch.step(PROMPTS)
    alone.step(PROMPTS[1])
    together, singly = [], []
    for decoded in range(1, kind.decoded + 1):
        together.append(batch.step(1))
        singly.append(alone.step(1)[0])
        held = batch.layer.slots.count
        assert fullest(recipe, held[None]) <= limit(policy, tokens, decoded)
        if decoded % EVERY == 0 or decoded == kind.decoded:
            batch.check()
            check_ends(batch)
            assert held_by(batch, 1) == held_by(alone, 0)
    outputs = torch.stack(together)
    assert bool(outputs.isfinite().all())
    assert torch.allclose(outputs[:, 1], torch.stack(singly), atol=1e-5)
    seen = [prompt + kind.decoded for prompt in PROMPTS]
    assert batch.layer.progress.row_seen(2).tolist() == seen


def check_ends(feeder: Feeder) -> None:
    """Are sinks and window there, where the policy promises them?"""
    policy, position = feeder.layer.policy, feeder.layer.slots.position
    sink = getattr(policy, "sink", 0)
    window = max(getattr(policy, "window", 0), getattr(policy, "recent", 0))
    seen = torch.tensor(feeder.seen)[:, None, None]
    assert bool((count((position >= 0) & (position < sink)) == sink).all())
    assert bool((count(position >= seen - window) == window).all())


def count(which: Tensor) -> Tensor:
    """How many, head by head."""
    return which.sum(-1)


def held_by(feeder: Feeder, row: int) -> list[list[int]]:
    """The positions each head of a row holds."""
    return [[p for p in head.tolist() if p >= 0] for head in feeder.layer.slots.position[row]]
