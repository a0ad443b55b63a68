"""Shares that are written out, layer by layer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from kvhive.allocations import Facts
from kvhive.allocations.per_layer import PerLayer
from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from tests.support import kept_sets, random_ids, read


def by_layer(weights: tuple[float, ...], layers: int, budget: int, floor: int, seen: int) -> object:
    """Tokens of each layer, for one head."""
    return PerLayer(weights).shares(Facts(layers, 1, seen), budget, floor)[:, 0].tolist()


def test_in_proportion_to_the_weights() -> None:
    assert by_layer((3.0, 1.0), 2, 100, 5, 1000) == [150, 50]
    assert by_layer((6.0, 2.0), 2, 100, 5, 1000) == [150, 50]
    assert by_layer((), 3, 100, 5, 1000) == [100] * 3
    assert by_layer((1.0, 1.0, 0.5), 3, 100, 5, 1000) == [120, 120, 60]


def test_nobody_below_the_floor_or_beyond_what_there_is() -> None:
    assert by_layer((1.0, 0.0), 2, 100, 5, 1000) == [195, 5]
    assert by_layer((8.0, 1.0, 1.0), 3, 100, 5, 120) == [120, 90, 90]
    assert by_layer((3.0, 1.0), 2, 100, 5, 60) == [150, 50], (
        "for what is decoded after a short prompt"
    )


def test_as_a_recipe(model: PreTrainedModel) -> None:
    recipe = "h2o(slack=0)@24/per_layer(weights=[3.0, 1.0])"
    parsed = Recipe.parse(recipe)
    assert parsed.allocation == PerLayer((3.0, 1.0))
    assert Recipe.parse(str(parsed)) == parsed
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, random_ids(1, 100), 80)
    assert [[len(head) for head in layer] for layer in kept_sets(cache)] == [[36, 36], [12, 12]]


def test_a_wrong_number_of_weights_is_refused_before_anything_is_read(
    model: PreTrainedModel,
) -> None:
    sentence = r"weights must be one number for each of the 2 compressed layers, got 3"
    with pytest.raises(ValueError, match=sentence):
        HiveCache.for_model(model, "h2o@24/per_layer(weights=[1.0, 2.0, 3.0])")


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("[0.0, 0.0]", "must not all be 0"),
        ("[-1.0, 2.0]", "at least 0, got -1.0"),
        ("7", "numbers, as in"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe.parse(f"h2o@24/per_layer(weights={weights})")
