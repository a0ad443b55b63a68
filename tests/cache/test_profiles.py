"""Which profile is read: the one given, the one a knob names, the one that is shipped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.profiles import profile_by_shape, profile_for
from kvhive.calibration import Profile
from kvhive.model.facts import ModelFacts, facts_for, fingerprint
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from tests.allocations.test_baklava import of, profile
from tests.support import kept_sets, random_ids, read, tiny_llama

Ship = Callable[[Profile], None]


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Ship:
    """Makes a profile the one that comes with kvhive."""

    def shipped(made: Profile) -> None:
        monkeypatch.setattr("kvhive.cache.profiles.shipped", lambda method: (profile(), made))

    return shipped


def test_given_goes_before_named_and_named_before_shipped(
    model: PreTrainedModel, tmp_path: Path, ship: Ship
) -> None:
    given, named, shipped = (of(model, seed=seed) for seed in range(3))
    named.save(tmp_path / "p")
    ship(shipped)
    plain = Recipe.parse("h2o@40/baklava")
    knob = Recipe.parse(f"h2o@40/baklava(profile='{tmp_path / 'p'}')")
    facts = facts_for(model)
    assert profile_for(plain, facts, given) is given
    assert profile_for(knob, facts, given) is given
    assert profile_for(plain, facts) is shipped
    found = profile_for(knob, facts)
    assert found is not None
    assert torch.equal(found.tensors["heads"], named.tensors["heads"])
    assert profile_for(Recipe.parse("h2o@40"), facts) is None


def test_a_shipped_profile_works_at_once_in_any_dtype(ship: Ship) -> None:
    kept = tiny_llama(dtype=torch.bfloat16)
    ship(of(kept))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(kept).to(dtype)
        cache = HiveCache.for_model(model, "streaming_llm@40/baklava")
        read(model, cache, random_ids(1, 120), 120)
        assert sorted(len(head) for one in kept_sets(cache) for head in one) == [10, 10, 70, 70]


def test_other_weights_are_another_model(ship: Ship) -> None:
    marks = {
        fingerprint(tiny_llama(seed, dtype))
        for seed in range(3)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(marks) == 3
    ship(of(tiny_llama()))
    with pytest.raises(ValueError, match="none of this model comes with kvhive: make one with"):
        HiveCache.for_model(tiny_llama(1), "h2o@40/baklava")


def test_a_pickled_cache_still_minds_the_dtype() -> None:
    model = tiny_llama()
    cache = HiveCache.for_model(model, "h2o@40")
    read(model, cache, random_ids(1, 60), 60)
    other = tiny_llama(dtype=torch.bfloat16)
    HiveCache.for_model(other, "h2o@40")
    with pytest.raises(ValueError, match="this cache was made for another LlamaForCausalLM"):
        read(other, pickle.loads(pickle.dumps(cache)), random_ids(1, 1), 1)


def test_a_profile_of_another_model_leaves_the_cache_usable(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    wrong = of(tiny_llama(1))
    wrong.save(tmp_path / "p")
    cache = HiveCache.for_model(model, "h2o@40")
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, f"h2o@40/baklava(profile='{tmp_path / 'p'}')")
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, "h2o/baklava", wrong, fits="1MiB", tokens=200)
    read(model, cache, random_ids(1, 80), 80)
    assert cache.report().tokens_kept == 40


def test_sizes_are_known_with_a_profile(model: PreTrainedModel, ship: Ship) -> None:
    """The footprint is a bound, and a budget that fits a size does."""
    ship(of(model))
    outline = Outline.of(model, facts_for(model).rotations or ())
    recipe = Recipe.parse("streaming_llm@40/baklava")
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, random_ids(1, 300), 300)
    bound = footprint(recipe, outline, Workload(tokens=300, turn=1))
    assert cache.nbytes <= bound.between_steps
    fitted = HiveCache.for_model(model, "streaming_llm/baklava", fits="64KiB", tokens=300, turn=1)
    read(model, fitted, random_ids(1, 300), 300)
    assert fitted.nbytes <= 64 * 1024
    assert fitted.report().tokens_kept > 40


def test_a_model_that_is_not_loaded_takes_a_profile_of_its_shape(
    model: PreTrainedModel, ship: Ship, tmp_path: Path
) -> None:
    outline = Outline.of(model, ())
    recipe = Recipe.parse("h2o@40/baklava")
    with pytest.raises(ValueError, match="none of a model of such layers and heads comes with"):
        profile_by_shape(recipe, outline)
    fits = replace(profile(), fingerprint="anything")
    ship(fits)
    assert profile_by_shape(recipe, outline) is not None
    profile(3).save(tmp_path / "p")
    with pytest.raises(ValueError, match="is of 3 layers with 2 KV heads, not of 2"):
        profile_by_shape(Recipe.parse(f"h2o@40/baklava(profile='{tmp_path / 'p'}')"), outline)


def test_layers_that_a_policy_leaves_whole(model: PreTrainedModel, ship: Ship) -> None:
    """l2norm leaves its first layers whole: the others share by their own importance."""
    ship(of(model))
    cache = HiveCache.for_model(
        model, "l2norm(skip_layers=[0], slack=0)@40/baklava(allocation=proportional)"
    )
    read(model, cache, random_ids(1, 120), 120)
    assert [len(head) for head in kept_sets(cache)[0]] == [120, 120]
    assert sum(len(head) for head in kept_sets(cache)[1]) == 80


def test_facts_know_the_model(model: PreTrainedModel) -> None:
    assert ModelFacts.of(model).dtype == torch.float32
