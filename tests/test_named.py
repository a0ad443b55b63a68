"""Recipes that have a name are recipes like any others, wherever one is written."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.named import NAMED, with_name
from kvhive.recipe import Recipe
from tests.support import random_ids


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_recipe(name: str) -> None:
    recipe = Recipe.parse(f" {name} ")
    assert recipe == Recipe.parse(NAMED[name].recipe)
    assert str(recipe) == NAMED[name].recipe, "write it as it prints itself"
    assert with_name(str(recipe)) == f"{name} = {recipe}"


@pytest.mark.parametrize("name", NAMED)
def test_a_cache_is_several_times_smaller(model: PreTrainedModel, name: str) -> None:
    cache = HiveCache.for_model(model, name)
    cache.read(random_ids(1, 450))
    report = cache.report()
    assert report.recipe == NAMED[name].recipe
    assert report.nbytes < 0.8 * report.full_nbytes  # heads of 8 numbers: grids weigh much


@pytest.mark.parametrize("text", ["small@0.3", "small(bits=4)", "balanced+kivi", "small/ada"])
def test_a_name_is_a_whole_recipe(text: str) -> None:
    with pytest.raises(ValueError, match=r"is a whole recipe; write it alone, or change what it"):
        Recipe.parse(text)


def test_words_that_begin_like_a_name_are_no_name() -> None:
    assert with_name("h2o@0.4") == "h2o@0.4"
    with pytest.raises(ValueError, match=r"unknown policy 'smaller'"):
        Recipe.parse("smaller@0.3")
