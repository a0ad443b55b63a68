"""Tiers: who is held best, at what cost, and which recipes are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.plan import Plan
from kvhive.recipe import Recipe
from kvhive.stores.base import LayerFacts, Store
from kvhive.stores.kivi import Kivi
from kvhive.stores.rotated import Rotated
from kvhive.stores.tiers import Tiers
from tests.support import kept_sets, random_ids, read, tiny_llama

PROMPT, SINK, RESIDUAL = 200, 2, 8
STORE = f"tiers(bits=8, rest_bits=2, share=0.2, group=8, residual={RESIDUAL}, sink={SINK})"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Heads of 16 numbers, which fill whole bytes."""
    return tiny_llama(hidden_size=64)


def cache_of(model: PreTrainedModel, recipe: str) -> HiveCache:
    """After a prompt."""
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, random_ids(1, PROMPT), PROMPT)
    return cache


@pytest.mark.parametrize(
    "recipe",
    ["snapkv@{}", "hive(reconstruct=false)@{}", "h2o@{}/global", "snapkv@{}/ada", "tova@{}"],
)
def test_the_best_are_those_that_a_smaller_budget_keeps(
    model: PreTrainedModel, recipe: str
) -> None:
    """Head by head, over the whole model where heads or layers compete: what the policy keeps at
    the share alone is held in 8 bits, all else between sinks and window in 2.
    """
    tiered = cache_of(model, f"{recipe.format(0.5)}+{STORE}")
    exact, alone = cache_of(model, recipe.format(0.5)), cache_of(model, recipe.format(0.2))
    best = kept_sets(alone)
    assert kept_sets(tiered) == kept_sets(exact)
    for place, (ours, theirs) in enumerate(
        zip(tiered.hive_layers(), exact.hive_layers(), strict=True)
    ):
        lost = (ours.store.view()[1] - theirs.store.view()[1]).abs().amax(-1)[0]
        size = theirs.store.view()[1].abs().max()
        for head, held in enumerate(kept_sets(tiered)[place]):
            off = lost[head, len(lost[head]) - len(held) :] / size
            for number, token in enumerate(held):
                if number < SINK or number >= len(held) - RESIDUAL:
                    assert off[number] == 0
                else:
                    assert (0 < off[number] < 0.006) == (token in best[place][head])


@pytest.mark.parametrize(("bits", "rest_bits"), [(4, 3), (8, 2), (3, 3)])
def test_bytes_are_what_the_bits_say(bits: int, rest_bits: int) -> None:
    """A value of 64 numbers has grids for 2 groups, a key shares its grid with 31 others."""
    store: Store = Tiers(bits, 0.25, rest_bits, residual=0, sink=0).new(LayerFacts(), [])
    store.append(*torch.randn(2, 1, 2, 512, 64).bfloat16(), 512)
    place = torch.arange(512).expand(1, 2, -1)
    store = store.compact(Plan.keeping(place >= 0, best=place % 4 == 0), 512)
    codes = 2 * 2 * 64 * (128 * bits + 384 * rest_bits) // 8
    values, keys = 2 * 512 * 2 * 4, 2 * 16 * 64 * 4
    labels = 2 * 512
    assert codes + values + keys + labels <= store.nbytes <= codes + values + keys + labels + 1000
    held = 2 * 2 * 512 * 64 * 2
    assert store.nbytes < held * ((bits + 3 * rest_bits) / 4 + 1.2) / 16


def test_what_is_decoded_later_is_held_best() -> None:
    """Exactly at first; in the bits of the best once a group is full."""
    store: Store = Tiers(bits=8, rest_bits=2, residual=4, sink=0).new(LayerFacts(), [])
    keys, values = torch.randn(2, 1, 1, 100, 64)
    store.append(keys[:, :, :10], values[:, :, :10], 10)
    store.pack()
    for count in range(11, 101):
        store.append(keys[:, :, count - 1 : count], values[:, :, count - 1 : count], count)
        store.pack()
        off = (store.view()[0] - keys[:, :, :count]).abs().amax(-1)
        assert int((off > 0).sum()) == max(0, count - 4) // 32 * 32
        assert float(off.max()) < 0.02


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ("full+rotated(bits=5)", r"rotated: bits must be 2, 3, 4 or 8, got 5"),
        ("full+kivi(value_bits=6)", r"kivi: value_bits must be 2, 3, 4 or 8, got 6"),
        ("snapkv@0.5+tiers(rest_bits=1)", r"tiers: rest_bits must be 2, 3, 4 or 8, got 1"),
        ("full+kivi(residual=40)", r"kivi: residual must be a multiple of the group of 32"),
        ("elastic@0.5+kivi", r"elastic folds keys into others, and kivi cannot replace"),
        ("elastic@0.5+tiers", r"elastic folds keys into others, and tiers cannot replace"),
        ("streaming_llm@96+kivi", r"streaming_llm counts positions in the cache.*or use \+rotated"),
        ("full+tiers", r"tiers holds the best of what a budget leaves, and full has no budget"),
        ("corm+tiers", r"tiers holds the best .* and corm has no budget"),
        ("snapkv@0.3+tiers(share=0.4)", r"tiers: share=0.4 .* cannot be the best of the 0.3"),
    ],
)
def test_what_cannot_work_is_refused(recipe: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe.parse(recipe)


@pytest.mark.parametrize("kind", [Rotated(group=24), Kivi(group=24, residual=48), Tiers(group=24)])
def test_a_group_divides_the_head(kind: Rotated | Kivi | Tiers) -> None:
    with pytest.raises(ValueError, match=r"group=24 does not divide .* choose one of 8, 16, 32"):
        kind.check_heads(64)
    with pytest.raises(ValueError, match=r"multiple of 8; this model's have 20"):
        kind.check_heads(20)
    kind.check_heads(96)


def test_a_model_with_other_heads_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"rotated: group=32 does not divide .* choose one of 8"):
        HiveCache.for_model(model, "full+rotated(group=32)")
