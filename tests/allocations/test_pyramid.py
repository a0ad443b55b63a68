"""PyramidKV: the schedule over layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvhive.allocations import Facts
from kvhive.allocations.pyramid import Pyramid
from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from tests.support import kept_sets, left_padded, random_ids, read


def by_layer(pyramid: Pyramid, layers: int, budget: int, window: int, seen: int) -> list[int]:
    """Tokens of each layer."""
    shares = pyramid.shares(Facts(layers, 2, seen), budget, window + 1)
    assert torch.equal(shares[:, 0], shares[:, 1])
    return shares[:, 0].tolist()


@given(
    layers=st.integers(1, 40),
    past=st.integers(1, 90),
    window=st.integers(0, 40),
    seen=st.integers(1, 600),
    beta=st.integers(1, 60),
)
def test_exact_and_falling_within_the_prompt(
    layers: int, past: int, window: int, seen: int, beta: int
) -> None:
    budget = past + window
    shares = by_layer(Pyramid(beta=beta), layers, budget, window, seen)
    assert sum(shares) == layers * budget
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > window
    assert shares[0] <= seen or set(shares) == {budget}
    if layers == 1 or beta == 1 or seen < max(2 * past, budget):
        assert set(shares) == {budget}


@given(layers=st.integers(2, 40), past=st.integers(60, 200), beta=st.integers(1, 60))
def test_the_slope_is_the_authors(layers: int, past: int, beta: int) -> None:
    """Where neither end is in the way: within one token of the real-valued steps."""
    shares = by_layer(Pyramid(beta=beta), layers, past + 8, 8, 4000)
    first, last = 2 * past - past / beta, past / beta
    for layer, share in enumerate(shares):
        assert abs(share - 8 - (first - layer * (first - last) / (layers - 1))) < 1


def test_the_reference_lets_the_total_drift() -> None:
    exact = by_layer(Pyramid(), 32, 128, 8, 4000)
    rounded = by_layer(Pyramid(schedule="reference"), 32, 128, 8, 4000)
    assert (sum(exact), sum(rounded)) == (4096, 4272)
    assert (rounded[0], rounded[-1]) == (242, 25)


def test_a_short_prompt_is_shared_evenly() -> None:
    """The jump at 2 B: below, every layer gets the budget."""
    for schedule in ("exact", "reference"):
        pyramid = Pyramid(schedule=schedule)  # type: ignore[arg-type]
        assert set(by_layer(pyramid, 32, 128, 8, 239)) == {128}
        assert by_layer(pyramid, 32, 128, 8, 240)[0] == 240


@pytest.mark.parametrize("schedule", ["exact", "reference", "kvpress"])
def test_one_layer_gets_the_budget(schedule: str) -> None:
    assert by_layer(Pyramid(schedule=schedule), 1, 128, 8, 4000) == [128]  # type: ignore[arg-type]


def test_a_least_for_the_last_layers() -> None:
    assert by_layer(Pyramid(beta=50), 10, 28, 8, 900)[-1] == 8 + 1
    shares = by_layer(Pyramid(beta=50, min_past=6), 10, 28, 8, 900)
    assert shares[-1] == 8 + 6
    assert sum(shares) == 280
    assert set(by_layer(Pyramid(min_past=500), 10, 28, 8, 900)) == {28}


def test_a_least_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(ValueError, match=r"pyramid: min_past=4 is for schedule=exact alone"):
        Pyramid(min_past=4, schedule="reference")


def test_the_papers_recipe(model: PreTrainedModel) -> None:
    """SnapKV with a window of 8, two layers, a prompt and what is decoded; rows of their own."""
    recipe = "snapkv(window=8, kernel=7, pooling=max, slack=0)@24/pyramid"
    assert str(Recipe.parse(recipe)) == recipe
    lengths = (90, 30)  # the second has fewer than 2 B tokens
    ids, mask = left_padded([random_ids(length, seed=length) for length in lengths])
    cache = HiveCache.for_model(model, recipe)
    ids = torch.cat([ids, random_ids(2, 20, seed=5)], 1)
    read(model, cache, ids, 90, mask)
    for row, expected in enumerate(([39, 9], [24, 24])):
        kept = kept_sets(cache, row)
        assert [[len(head) for head in layer] for layer in kept] == [[n] * 2 for n in expected]
        newest = set(range(lengths[row] + 12, lengths[row] + 20))
        assert all(newest <= set(head) for layer in kept for head in layer)
