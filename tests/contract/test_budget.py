"""What every policy keeps, step by step: never more than its budget, whole slots, in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvhive.budget import FLOOR
from kvhive.recipe import Recipe
from tests.contract.recipes import (
    SELECTIVE,
    SHARES,
    SMALL,
    emptiest,
    fullest,
    guarding,
    limit,
    with_slack,
)
from tests.support import Feeder

PROMPT = 150
DECODED = 300
UNSLACKENED = [with_slack(recipe, 0) for recipe in SELECTIVE]
GUARDED = [recipe for recipe in map(guarding, SELECTIVE) if recipe is not None]


def live(feeder: Feeder) -> Iterator[tuple[int, int, int]]:
    """A prompt, decoding, a second prompt in chunks, decoding: (tokens, decoded, seen at the
    prompt).
    """
    feeder.step(PROMPT)
    yield PROMPT, 0, PROMPT
    for decoded in range(1, DECODED + 1):
        feeder.step(1)
        yield 1, decoded, PROMPT
    for chunk in (40, 7, 64):
        feeder.step(chunk)
        yield chunk, 0, feeder.seen[0]
    turn = feeder.seen[0]
    for decoded in range(1, 70):
        feeder.step(1)
        yield 1, decoded, turn


def allowed(recipe: Recipe, decoded: int, read: int) -> int | None:
    """The most a head may hold after a step, from the recipe alone; None for no limit."""
    policy, budget = recipe.policy, recipe.budget
    if budget is None:
        alone = policy.sizing.alone
        return None if alone is None else alone(read + decoded)
    if budget.share is None:
        assert budget.tokens is not None
        return limit(policy, budget.tokens, decoded)
    return limit(policy, max(round(budget.share * read), FLOOR, policy.sizing.least), decoded)


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES, *UNSLACKENED], ids=str)
def test_never_more_than_the_budget(recipe: str | Recipe) -> None:
    feeder = Feeder(recipe)
    for step, (_, decoded, read) in enumerate(live(feeder)):
        most = allowed(feeder.recipe, decoded, read)
        held = feeder.layer.slots.count
        assert most is None or fullest(recipe, held[None]) <= most
        least = min(feeder.seen[0], most or feeder.seen[0]) // 4
        assert emptiest(recipe, held[None]) >= least, "evicts too much"
        assert feeder.layer.get_seq_length() == feeder.seen[0]
        if step % 41 == 0:
            feeder.check()
    feeder.check()
    assert feeder.layer.get_mask_sizes(5) == (feeder.seen[0] + 5, 0)
    assert feeder.layer.progress.row_seen(1).tolist() == feeder.seen


@pytest.mark.parametrize("recipe", GUARDED, ids=str)
def test_sinks_and_window_are_always_there(recipe: Recipe) -> None:
    feeder = Feeder(recipe, tapes=(0, 1))
    policy = recipe.policy
    sink = getattr(policy, "sink", 0)
    window = max(getattr(policy, "window", 0), getattr(policy, "recent", 0))
    for _, _, _ in live(feeder):
        seen = feeder.seen[0]
        wanted = torch.tensor([*range(sink), *range(max(sink, seen - window), seen)])
        assert bool(holds(feeder.layer.slots.position, wanted).all())


def holds(position: Tensor, wanted: Tensor) -> Tensor:
    """bool `[b, K, wanted]`: which of the wanted positions a head holds."""
    return (position[..., None] == wanted).any(dim=2)


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_the_same_stream_gives_the_same_decisions(recipe: str) -> None:
    first, second = Feeder(recipe), Feeder(recipe)
    for feeder in (first, second):
        for tokens in (PROMPT, *[1] * 60, 40, 7, *[1] * 20):
            feeder.step(tokens)
    assert torch.equal(first.layer.slots.position, second.layer.slots.position)
    for name in first.layer.policy.columns:
        assert torch.equal(first.layer.slots[name], second.layer.slots[name])
