"""Budgets found for a size: the largest that holds, and what is said where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.budget import Budget
from kvhive.cache.fitting import fitted
from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.room import HEADROOM
from kvhive.model.outline import Outline
from kvhive.policies import POLICIES
from kvhive.recipe import Recipe
from tests.support import random_ids, tiny

SIZINGS = {name: policy().sizing for name, policy in POLICIES.items()}
BUDGETED = [name for name, sizing in SIZINGS.items() if sizing.budgeted and sizing.decoding]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def outline(model: PreTrainedModel) -> Outline:
    return Outline.of(model, HiveCache.for_model(model, "full").facts.rotations or ())


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("tokens", [None, 5_000])
def test_the_largest_budget_is_found(outline: Outline, name: str, tokens: int | None) -> None:
    work, size = Workload(batch=2, tokens=tokens), 600 * 2**10
    recipe = fitted(name, size, outline, work)
    assert recipe.budget is not None
    assert recipe.budget.tokens is not None
    assert footprint(recipe, outline, work).between_steps <= size
    larger = [replace(recipe, budget=Budget(tokens=recipe.budget.tokens + n)) for n in (1, 16)]
    told = [footprint(one, outline, work).between_steps for one in larger]
    assert max(told) > size


@pytest.mark.parametrize("name", ["h2o", "buzz", "streaming_llm(sink=2)"])
def test_the_cache_stays_within_the_size(model: PreTrainedModel, name: str) -> None:
    cache = HiveCache.for_model(model, name, fits="80KiB", tokens=400)
    ids = random_ids(1, 400)
    with torch.no_grad():
        for part in (ids[:, :200], ids[:, 200:260], *ids[:, 260:].split(1, 1)):
            model(part, past_key_values=cache)
            assert cache.report().nbytes <= 80 * 2**10
    cache.positions_kept()
    assert cache.nbytes <= 80 * 2**10


def test_an_answer_alone_leaves_more(model: PreTrainedModel) -> None:
    turns, answer = (
        HiveCache.for_model(model, "h2o", fits="80KiB", **turn).recipe.budget
        for turn in ({}, {"turn": 1})
    )
    assert turns is not None
    assert answer is not None
    assert turns.tokens is not None
    assert answer.tokens == turns.tokens + HEADROOM - 1


def test_enough_for_everything_keeps_everything(outline: Outline) -> None:
    assert str(fitted("h2o", "1GiB", outline, Workload(tokens=1000))) == "h2o@1000"


def test_the_other_parts_of_a_recipe_stay(outline: Outline) -> None:
    recipe = fitted("h2o(recent=9, positions=cache, slack=3)/uniform", "1MiB", outline, Workload())
    assert str(recipe).startswith("h2o(recent=9, positions=cache, slack=3)@")


@pytest.mark.parametrize("recipe", ["h2o@0.4", "h2o@100", Recipe.parse("h2o@100")])
def test_a_budget_beside_a_size_is_refused(model: PreTrainedModel, recipe: str | Recipe) -> None:
    with pytest.raises(ValueError, match=r"h2o@.* has a budget already: leave @.* out"):
        HiveCache.for_model(model, recipe, fits="1MiB")


def test_knobs_that_add_up_to_a_budget_are_refused(outline: Outline) -> None:
    with pytest.raises(ValueError, match="its knobs add up to a budget of 104 already"):
        fitted("buzz(sink=4, window=50, threshold=50)", "1MiB", outline, Workload())


def test_too_small_a_size_is_refused_with_what_would_do(outline: Outline) -> None:
    work = Workload(batch=3, turn=1)
    least = footprint(Recipe.parse("snapkv@33"), outline, work).between_steps
    assert fitted("snapkv", least, outline, work).budget == Budget(tokens=33)
    said = r"are too few: snapkv needs at least 33 tokens x 2 layers x 2 KV heads x 3 rows.* KiB"
    with pytest.raises(ValueError, match=said):
        fitted("snapkv", least - 1, outline, work)


def test_full_says_whether_it_fits(model: PreTrainedModel, outline: Outline) -> None:
    cache = HiveCache.for_model(model, "full", fits="1MiB", tokens=500)
    assert str(cache.recipe) == "full"
    with pytest.raises(ValueError, match=r"full does not fit 1.0 MiB: for 5,000 tokens it needs"):
        fitted("full", "1MiB", outline, Workload(tokens=5000))
    with pytest.raises(ValueError, match="give tokens="):
        fitted("full", "1MiB", outline, Workload())


def test_what_sizes_itself_is_refused(outline: Outline) -> None:
    with pytest.raises(ValueError, match="sizes itself, so no budget can make it fit 1MiB"):
        fitted("kv_compress(rate=0.5)", "1MiB", outline, Workload())
    with pytest.raises(ValueError, match="snapkv does not evict while decoding"):
        fitted("snapkv(decode=none)", "1MiB", outline, Workload())


def test_tokens_without_a_size_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="give fits= too"):
        HiveCache.for_model(model, "h2o@100", tokens=100)
