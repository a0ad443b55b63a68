"""KVSharer's maps: what they may be, which pairs are used, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.recipe import Recipe
from kvhive.stores import LayerFacts
from kvhive.stores.dense import DenseStore
from kvhive.stores.kvsharer import KVSharer, linked, shared
from tests.stores.sharing_maps import profile, profile_of, random_pairs
from tests.support import random_ids, read, tiny, tiny_llama

PAIRS = [(5, 1), (3, 0), (4, 2)]


@given(layers=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_maps_point_back_to_layers_that_hold_their_own(
    layers: int, share: float, seed: int
) -> None:
    pairs = random_pairs(layers, round(share * (layers - 1)), seed)
    sources = shared(layers, pairs)
    assert sources[0] == 0
    assert all(source <= place for place, source in enumerate(sources))
    assert all(sources[source] == source for source in sources)
    assert {place for place, source in enumerate(sources) if place != source} == {
        later for later, _ in pairs
    }


def test_chains_are_resolved_both_ways() -> None:
    """Whoever pointed at a layer that begins to share follows it, and it follows its source."""
    assert linked((0, 1, 2, 2), 2, 1) == (0, 1, 1, 1)
    assert linked((0, 0, 2, 3), 3, 1) == (0, 0, 2, 0)
    assert shared(5, [(4, 3), (3, 2), (2, 0)]) == (0, 1, 0, 0, 0)


def test_the_first_pairs_are_used() -> None:
    made = profile(PAIRS, 6)
    assert list(KVSharer(layers=0).sources(6, made)) == [0, 1, 2, 3, 4, 5]
    assert list(KVSharer(layers=1).sources(6, made)) == [0, 1, 2, 3, 4, 1]
    assert list(KVSharer(layers=3).sources(6, made)) == [0, 1, 2, 0, 2, 1]
    assert list(KVSharer().sources(6, made)) == [0, 1, 2, 0, 4, 1], "a quarter of 6, rounded"
    assert list(KVSharer(layers=3).sources(6, None)) == [0, 1, 2, 3, 4, 5]


def test_fewer_than_a_quarter_are_used_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="kvsharer: 1 layers share, not 3: the search found no"):
        sources = KVSharer().sources(12, profile([(7, 2)], 12))
    assert sources[7] == 2


def test_other_layers_hold_tokens_as_they_are_told() -> None:
    assert isinstance(KVSharer().new(LayerFacts(), []), DenseStore)
    assert isinstance(KVSharer(store="dense").new(LayerFacts(), []), DenseStore)
    with pytest.raises(ValueError, match="store must be one that reads no profile, such as dense"):
        KVSharer(store="kvsharer(layers=2)")
    with pytest.raises(ValueError, match="unknown store 'dens'; did you mean: dense"):
        Recipe.parse("full+kvsharer(store=dens)")


@pytest.mark.parametrize(
    ("pairs", "layers", "knobs", "sentence"),
    [
        (PAIRS, 5, {}, "this profile is of 5 layers, which does not fit 6 compressed layers"),
        ([(2, 2)], 6, {}, r"\[\(2, 2\)\] are no pairs of a layer and an earlier one"),
        ([(1, 4)], 6, {}, "are no pairs of a layer and an earlier one"),
        ([(6, 1)], 6, {}, "are no pairs of a layer and an earlier one"),
        ([(3, -1)], 6, {}, "are no pairs of a layer and an earlier one"),
        ([(3, 1), (3, 2)], 6, {}, "are no pairs of a layer and an earlier one"),
        ([], 6, {}, r"'pairs' has shape \(0, 2\), not \(P 2\)"),
        (PAIRS, 6, {"layers": 4}, "layers must be at most 3, which is what the search found"),
    ],
)
def test_profiles_that_do_not_suit(
    pairs: list[tuple[int, int]], layers: int, knobs: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        KVSharer(**knobs).check_profile(profile(pairs, layers), 6, 2)


def test_a_profile_without_its_tensors_is_damaged() -> None:
    whole = profile(PAIRS, 6)
    part = {name: one for name, one in whole.tensors.items() if name != "distance"}
    with pytest.raises(ValueError, match="is damaged: it has no 'distance'"):
        KVSharer().check_profile(Profile("kvsharer", "", "", "", part), 6, 2)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", "sdpa", num_hidden_layers=6)
    wrong = profile(PAIRS, 6, "other weights")
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, "full+kvsharer", wrong)
    wrong.save(tmp_path / "p")
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, f"full+kvsharer(profile='{tmp_path / 'p'}')")
    with pytest.raises(ValueError, match="kvsharer reads a profile, and none of this model comes"):
        HiveCache.for_model(model, "full+kvsharer")


def test_a_knob_names_the_file(tmp_path: Path) -> None:
    model = tiny("llama", "sdpa", num_hidden_layers=6)
    profile_of(model, PAIRS).save(tmp_path / "p")
    cache = HiveCache.for_model(model, f"h2o@40+kvsharer(layers=3, profile='{tmp_path / 'p'}')")
    assert cache.holding == (0, 1, 2)


def test_others_hold_tokens_in_few_bits() -> None:
    """A product: fewer layers, and fewer bits in each."""
    model = tiny("llama", "sdpa", num_hidden_layers=6)
    made, ids = profile_of(model, PAIRS), random_ids(1, 400)
    sizes = {}
    for recipe in ("full", "full+rotated", "full+kvsharer(layers=3, store=rotated)"):
        given = made if "kvsharer" in recipe else None
        cache = HiveCache.for_model(model, recipe, given)
        read(model, cache, ids, 390)
        sizes[recipe] = sum(layer.nbytes for layer in cache.hive_layers())
    full, rotated, both = sizes.values()
    assert both == pytest.approx(rotated / 2, rel=0.01)
    assert both < full / 4


def test_two_profiles_are_one_too_many(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="baklava and kvsharer read a profile each, and a cache"):
        Recipe.parse("h2o@0.4/baklava+kvsharer")


def test_sliding_layers_are_no_part_of_it() -> None:
    """Places count the compressed layers alone."""
    kinds = ["full_attention", "sliding_attention"] * 3
    model = tiny("qwen2", "sdpa", num_hidden_layers=6, layer_types=kinds, use_sliding_window=True)
    cache = HiveCache.for_model(model, "full+kvsharer(layers=1)", profile_of(model, [(2, 0)]))
    assert cache.compressed == (0, 2, 4)
    assert cache.holding == (0, 2)


def test_the_map_that_comes_with_kvhive() -> None:
    from kvhive.calibration.shipped import shipped

    (made,) = shipped("kvsharer")
    KVSharer(layers=15).check_profile(made, 30, 3)
    similarity = made.tensors["similarity"]
    assert bool((similarity > 0.5).all()), "each was accepted above the threshold"
    assert torch.equal(similarity, similarity.sort(descending=True).values), "here it only falls"


def test_layers_of_a_tiny_model_in_a_fork(model: PreTrainedModel) -> None:
    """The smallest case: two layers, one of which shares."""
    cache = HiveCache.for_model(
        tiny_llama(), "full+kvsharer(layers=1)", profile_of(model, [(1, 0)])
    )
    assert cache.holding == (0,)
    assert cache.fork().holding == (0,)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("full+kvsharer(store=think)", r"kvsharer: think holds what queries of its own layer use"),
        ("elastic@60+kvsharer(store=kivi)", r"kvsharer cannot replace single keys"),
        ("full+kvsharer(store=less)", r"store must be one that reads no profile"),
        ("full+kvsharer(store='rotated(bits=5)')", r"bits must be 2, 3, 4 or 8, got 5"),
    ],
)
def test_stores_that_cannot_be_shared_are_refused(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(recipe)


def test_heads_are_checked_by_the_store_beneath(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"group=16 does not divide this model's heads"):
        HiveCache.for_model(
            model, "full+kvsharer(store='rotated(group=16)')", profile_of(model, [(1, 0)])
        )
