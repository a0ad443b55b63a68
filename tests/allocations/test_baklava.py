"""BaKlaVa: shares by importance; what a profile must hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvhive.allocations import Facts
from kvhive.allocations._importance import best, change, combined, of_kv_heads, search, tiers
from kvhive.allocations.baklava import METHOD, Baklava
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.model.facts import ModelFacts
from kvhive.recipe import Recipe
from tests.support import kept_sets, random_ids, read


def profile(
    count: int = 2, kv_heads: int = 2, group: int = 2, seed: int = 0, **changed: Any
) -> Profile:
    """Of two texts and `count` layers, of random importance; the search chose 0.5 and 0.25."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "heads": torch.rand(2, count, kv_heads * group, generator=generator).double(),
        "layers": torch.rand(2, count, generator=generator).double(),
        "kv_heads": torch.tensor([kv_heads]),
        "parts": torch.tensor([0.0, 0.5]),
        "scales": torch.tensor([0.25]),
        "losses": torch.tensor([[3.0], [2.9]]),
        "uniform": torch.tensor([3.0]),
        "proportional": torch.tensor([2.95]),
        "choice": torch.tensor([0.5, 0.25]),
    }
    return Profile(METHOD, "0" * 64, "two texts", "2026-11-28", tensors | changed)


def of(model: PreTrainedModel, **changed: Any) -> Profile:
    """A profile of this model."""
    return replace(profile(**changed), fingerprint=ModelFacts.of(model).fingerprint)


PLANS = [
    Baklava(),
    Baklava(allocation="proportional"),
    Baklava(allocation="proportional", use_layer=False, group="max"),
    Baklava(allocation="tiers", low_frac=0.3, low_scale=0.1, floor=1),
    Baklava(allocation="tiers", low_frac=1.0, low_scale=0.0),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@given(
    layers=st.integers(1, 7),
    heads=st.integers(1, 4),
    group=st.integers(1, 3),
    floor=st.integers(1, 20),
    above=st.integers(0, 60),
    seen=st.integers(0, 400),
    seed=st.integers(0, 99),
)
def test_whole_numbers_an_exact_total_and_nobody_out_of_bounds(
    plan: Baklava,
    layers: int,
    heads: int,
    group: int,
    floor: int,
    above: int,
    seen: int,
    seed: int,
) -> None:
    made, budget = profile(layers, heads, group, seed), floor + above
    shares = plan.shares(Facts(layers, heads, seen, made), budget, floor)
    assert shares.shape == (layers, heads)
    assert shares.dtype == torch.int64
    assert int(shares.sum()) == budget * layers * heads
    assert int(shares.min()) >= max(floor, min(plan.floor, budget))
    assert seen <= budget or int(shares.max()) <= seen
    if plan.allocation == "proportional":
        order = plan.importance(made).flatten().argsort()
        in_order = shares.flatten()[order]
        assert (in_order.diff() >= -1).all(), "but for the token that rounding may add"


def test_what_is_passed_on_as_it_is_changes_nothing() -> None:
    x, y = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    assert change(x, x).abs().max() < 1e-12
    assert torch.allclose(change(x, -x), torch.tensor(2.0).double())
    assert torch.allclose(change(x, y), change(3 * x, 0.5 * y), atol=1e-6)
    slow = [
        [1 - sum(float(torch.cosine_similarity(a, b, 0)) for a, b in zip(u, v, strict=True)) / 9]
        for u, v in zip(x.flatten(0, 1).double(), y.flatten(0, 1).double(), strict=True)
    ]
    assert torch.allclose(change(x, y).flatten(), torch.tensor(slow).flatten().double())


def test_a_head_that_changes_nothing_gets_the_floor() -> None:
    heads = torch.tensor([[[0.0, 0.0, 0.5, 0.7], [0.4, 0.4, 0.3, 0.2]]]).double()
    made = profile(heads=heads)
    shares = Baklava("proportional", floor=9).shares(Facts(2, 2, 1000, made), 100, 5)
    assert shares[0, 0] == 9


def test_texts_in_another_order_give_the_same_shares() -> None:
    made = profile(5)
    turned = {name: made.tensors[name].flip(0) for name in ("heads", "layers")}
    other = replace(made, tensors={**made.tensors, **turned})
    for plan in PLANS:
        one, two = (plan.shares(Facts(5, 2, 900, each), 90, 5) for each in (made, other))
        assert torch.equal(one, two)


def test_groups_and_layers() -> None:
    heads = torch.tensor([[[0.1, 0.3, 0.6, 0.2]]])
    assert torch.allclose(of_kv_heads(heads, 2, "mean"), torch.tensor([[[0.2, 0.4]]]).double())
    assert torch.allclose(of_kv_heads(heads, 2, "max"), torch.tensor([[[0.3, 0.6]]]).double())
    kv = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    layer = torch.tensor([3.0, 1.0])
    assert combined(kv, None).tolist() == [[0.5, 1.5], [1.0, 1.0]]
    assert combined(kv, layer).tolist() == [[0.75, 2.25], [0.5, 0.5]]


def test_tiers_take_the_least_important_first() -> None:
    importance = torch.tensor([[0.5, 2.0], [0.5, 1.0]])
    assert tiers(importance, 400, 1, None, 0.25, 0.2).tolist() == [[20, 127], [127, 126]]
    assert tiers(importance, 400, 1, None, 0.5, 0.2).tolist() == [[20, 180], [20, 180]]
    assert tiers(importance, 400, 1, None, 0.0, 0.2).tolist() == [[100, 100], [100, 100]]
    assert tiers(importance, 400, 30, 150, 0.5, 0.2).tolist() == [[50, 150], [50, 150]]


def test_the_search_asks_for_uniform_once_and_takes_the_first_best() -> None:
    asked = []

    def loss(part: float, scale: float) -> float:
        asked.append((part, scale))
        return 1.0 if part == 0.5 else 2.0

    parts, scales = (0.0, 0.5), (0.1, 0.2)
    losses = search(parts, scales, loss)
    assert losses.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert asked == [(0.0, 0.1), (0.5, 0.1), (0.5, 0.2)]
    assert best(losses, parts, scales) == (0.5, 0.1)


def test_the_searched_plan_is_that_of_the_profile() -> None:
    facts = Facts(2, 2, 900, profile())
    searched = Baklava().shares(facts, 100, 5)
    assert torch.equal(searched, Baklava("tiers", 0.5, 0.25).shares(facts, 100, 5))
    assert sorted(searched.flatten().tolist()) == [25, 25, 175, 175]


def test_layers_that_are_left_whole_do_not_shift_the_others() -> None:
    made = profile(4)
    plan = Baklava("proportional")
    some = plan.shares(Facts(2, 2, 900, made, (1, 3)), 90, 5).double()
    weights = plan.importance(made)[[1, 3]]
    assert torch.allclose(some / some.sum(), weights / weights.sum(), atol=2 / 360)


def test_a_plan_of_equal_shares_is_the_plain_policy(model: PreTrainedModel) -> None:
    ids = random_ids(1, 160)
    found = []
    for allocation in ("uniform", "baklava(allocation=tiers, low_frac=0.0)"):
        recipe = f"streaming_llm@0.4/{allocation}"
        given = of(model) if "baklava" in allocation else None
        cache = HiveCache.for_model(model, recipe, given)
        found.append((read(model, cache, ids, 120), kept_sets(cache)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_as_a_recipe(model: PreTrainedModel, tmp_path: Path) -> None:
    of(model).save(tmp_path / "p")
    recipe = Recipe.parse(f"h2o(slack=0)@40/baklava(profile='{tmp_path / 'p'}')")
    assert Recipe.parse(str(recipe)) == recipe
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, random_ids(1, 120), 120)
    assert sorted(len(head) for layer in kept_sets(cache) for head in layer) == [10, 10, 70, 70]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"heads": torch.rand(2, 4)}, r"'heads' has shape \(2, 4\), not \(T L H\)"),
        ({"layers": torch.rand(2, 3)}, r"'layers' has shape \(2, 3\), not \(T L\)"),
        ({"choice": torch.tensor([0.5])}, r"'choice' has shape \(1,\), not \(2\)"),
        ({"heads": torch.full((2, 2, 4), torch.nan)}, "'heads' holds numbers that are not finite"),
        ({"count": 3}, "of 3 layers with 2 KV heads, not of 2 compressed layers with 2"),
        ({"kv_heads": 4, "group": 1}, "of 2 layers with 4 KV heads, not of 2 compressed layers"),
        ({"heads": torch.rand(2, 2, 3)}, "of 2 layers with 2 KV heads"),
        ({"heads": -torch.rand(2, 2, 4)}, "'heads' is not between 0 and 2"),
        ({"choice": torch.tensor([0.5, 7.0])}, "'choice' is not between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_cache_is_made(
    model: PreTrainedModel, changed: dict[str, Any], sentence: str
) -> None:
    bad = of(model, **changed)
    with pytest.raises(ValueError, match=sentence):
        HiveCache.for_model(model, "h2o@40/baklava", profile=bad)


def test_a_profile_without_a_tensor_is_refused(model: PreTrainedModel) -> None:
    whole = of(model)
    for name in whole.tensors:
        tensors = {other: value for other, value in whole.tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"it has no '{name}'; make it anew"):
            HiveCache.for_model(model, "h2o@40/baklava", replace(whole, tensors=tensors))


def test_a_profile_that_nobody_made_says_how(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make one with kvhive calibrate --model MODEL --for bak"):
        HiveCache.for_model(model, "h2o@40/baklava")
    with pytest.raises(FileNotFoundError, match="no profile at"):
        HiveCache.for_model(model, f"h2o@40/baklava(profile='{tmp_path / 'none'}')")
