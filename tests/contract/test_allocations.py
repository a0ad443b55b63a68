"""Heads and layers that may hold different numbers of tokens: each keeps to its own."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from tests.contract.recipes import SELECTIVE, slanted
from tests.support import Feeder, divergence, kept_sets, left_padded, random_ids, read

UNEVEN = [
    recipe
    for recipe in (slanted(text) for text in SELECTIVE if "/" not in text)
    if recipe is not None
]
EXPECTED = {2: [85, 43], 4: [102, 77, 51, 26]}  # of 64 a head, by number of heads
COMPETING = (
    "snapkv(window=7)",
    "h2o(recent=7)",
    "buzz(sink=3, window=7)",
    "random(sink=3, recent=7)",
)
SHARING = (
    "ada",
    "ada(normalize=false, floor=0.0)",
    "global",
    "pyramid",
    "per_layer(weights=[5.0, 1.0])",
)


class Many(Feeder):
    """A KV head of its own for every query head."""

    kv_heads = Feeder.heads


@pytest.mark.parametrize("kind", [Feeder, Many])
@pytest.mark.parametrize("recipe", UNEVEN, ids=str)
def test_every_head_keeps_to_its_own_limit(kind: type[Feeder], recipe: Recipe) -> None:
    """A prompt, decoding, a second turn; sinks and window of every head are there."""
    feeder = kind(recipe)
    policy = feeder.layer.policy
    limits = torch.tensor(EXPECTED[feeder.kv_heads])
    for tokens in (150, *[1] * 80, 40, *[1] * 40):
        feeder.step(tokens)
        if policy.sizing.decoding or tokens > 1:
            assert bool((feeder.layer.slots.count <= limits).all())
        assert missing(feeder, getattr(policy, "sink", 0) or 0, window_of(recipe)) == 0
    feeder.check()
    if policy.name in ("snapkv", "h2o"):
        assert bool((feeder.layer.slots.count > limits * 0.9).all())


def window_of(recipe: Recipe) -> int:
    """Newest tokens that the recipe's knobs promise."""
    return max(getattr(recipe.policy, name, None) or 0 for name in ("window", "recent"))


def missing(feeder: Feeder, sink: int, window: int) -> int:
    """How many of the first and newest tokens some head lacks."""
    seen = feeder.seen[0]
    wanted = torch.tensor([*range(sink), *range(max(sink, seen - window), seen)])
    held = (feeder.layer.slots.position[..., None] == wanted).any(2)
    return int((~held).sum())


@pytest.mark.parametrize("recipe", UNEVEN, ids=str)
def test_a_row_of_a_padded_batch_is_as_it_is_alone(model: PreTrainedModel, recipe: Recipe) -> None:
    lengths, decoded = (190, 101), 30
    texts = [random_ids(length + decoded, seed=length) for length in lengths]
    ids, mask = left_padded([text[:-decoded] for text in texts])
    tails = torch.stack([text[-decoded:] for text in texts])
    batch = HiveCache.for_model(model, recipe)
    together = read(model, batch, torch.cat([ids, tails], 1), max(lengths), mask)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = HiveCache.for_model(model, recipe)
        single = read(model, alone, text[None], length)
        assert kept_sets(batch, row) == kept_sets(alone)
        assert divergence(together[row, max(lengths) - length :], single[0]) < 1e-5


@pytest.mark.parametrize("budget", [48, 0.3])
@pytest.mark.parametrize("allocation", SHARING)
@pytest.mark.parametrize("policy", COMPETING)
def test_the_total_is_the_budgets_and_sinks_and_window_are_there(
    model: PreTrainedModel, policy: str, allocation: str, budget: int | float
) -> None:
    recipe = Recipe.parse(f"{policy}@{budget}/{allocation}")
    sink, window = getattr(recipe.policy, "sink", 0) or 0, window_of(recipe)
    cache = HiveCache.for_model(model, recipe)
    ids, prompt = random_ids(1, 260), 220
    read(model, cache, ids[:, :prompt], prompt)
    most = 48 if budget == 48 else round(0.3 * prompt)
    for seen in range(prompt, 261):
        kept = cache.report().kept
        assert int(kept.sum()) <= most * kept.numel()
        if allocation.startswith("ada"):
            assert int(kept.sum(-1).max()) <= most * kept.shape[-1]
        for head in (head for layer in kept_sets(cache) for head in layer):
            assert {*range(sink), *range(seen - window, seen)} <= set(head)
        if seen < 260:
            read(model, cache, ids[:, seen : seen + 1], 1)
    if not policy.startswith("buzz"):
        assert int(kept.sum()) >= 0.9 * most * kept.numel()
