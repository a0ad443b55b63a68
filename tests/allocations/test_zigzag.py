"""ZigZagKV: budgets by what layers need."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvhive.allocations import Facts
from kvhive.allocations.zigzag import ZigZag, past_budgets, raw_budgets
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.model.facts import ModelFacts
from tests.support import kept_sets, left_padded, random_ids, read, tiny_llama

NEEDS = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


def profile(needs: list[float], fingerprint: str = "") -> Profile:
    """Of layers with one head, for tau = 0.9."""
    tensors = {"tau": torch.tensor([0.8, 0.9], dtype=torch.float64)}
    share = torch.tensor(needs)[:, None]
    return Profile(
        "zigzag", fingerprint, "", "", tensors | {"share": torch.stack([share * 0, share])}
    )


def clipped(needs: Tensor, mean: int, bound: float, most: int) -> list[float]:
    """As the card tells it: clip, share the surplus among the others in proportion, repeat."""
    budgets, full = raw_budgets(needs, mean, bound).tolist(), set[int]()
    while over := [i for i, budget in enumerate(budgets) if budget > most + 1e-9 and i not in full]:
        full |= set(over)
        rest = [i for i in range(len(budgets)) if i not in full]
        left = len(budgets) * mean - most * len(full) - bound * mean * len(rest)
        weight = sum(float(needs[i]) for i in rest)
        for i in range(len(budgets)):
            share = left * float(needs[i]) / weight if i in rest else 0.0
            budgets[i] = most if i in full else bound * mean + share
    return budgets


@given(needs=NEEDS, mean=st.integers(1, 300), bound=st.floats(0, 1), spare=st.integers(1, 300))
def test_whole_exact_and_in_the_order_of_needs(
    needs: list[int], mean: int, bound: float, spare: int
) -> None:
    lmba = torch.tensor(needs, dtype=torch.float64)
    budgets = past_budgets(lmba, mean, bound, mean + spare)
    assert int(budgets.sum()) == mean * len(needs)
    assert 1 <= int(budgets.min()) <= int(budgets.max()) <= mean + spare
    assert all(budget >= int(bound * mean * (1 - 1e-12)) for budget in budgets.tolist())
    ranked = sorted(zip(needs, budgets.tolist(), strict=True))
    assert all(other >= one for (_, one), (_, other) in pairwise(ranked)), "as needs are"
    real = clipped(lmba, mean, bound, mean + spare)
    if min(real) >= 1:
        ours = budgets.tolist()
        assert all(abs(one - other) < 1 + 1e-6 for one, other in zip(ours, real, strict=True))


@given(count=st.integers(1, 40), mean=st.integers(1, 300), bound=st.floats(0, 1))
def test_layers_alike_get_alike(count: int, mean: int, bound: float) -> None:
    assert set(past_budgets(torch.full((count,), 0.3), mean, bound, 999).tolist()) == {mean}
    lmba = torch.rand(count, generator=torch.Generator().manual_seed(count))
    assert set(past_budgets(lmba, mean, 1.0, 999).tolist()) == {mean}


def test_a_short_row_is_left_alone() -> None:
    facts = Facts(2, 3, 40, profile([0.1, 0.9]))
    assert torch.equal(ZigZag().shares(facts, 40, 5), facts.even(40))
    shares = ZigZag().shares(Facts(2, 3, 41, facts.profile), 40, 5)
    assert shares[:, 0].tolist() == [39, 41], "no layer gets more than there is"


def test_what_is_always_kept_comes_on_top() -> None:
    shares = ZigZag(bound=0.0).shares(Facts(2, 1, 500, profile([0.1, 0.3])), 48, 9)
    assert shares[:, 0].tolist() == [8 + 20, 8 + 60]


def test_profiles_that_do_not_fit_are_refused() -> None:
    model = tiny_llama()
    mine = ModelFacts.of(model).fingerprint
    with pytest.raises(ValueError, match=r"tau must be one of 0\.8, 0\.9, .* got 0\.7; learn it"):
        HiveCache.for_model(model, "snapkv@60/zigzag(tau=0.7)", profile([0.1, 0.3], mine))
    with pytest.raises(ValueError, match="of 3 layers, which does not fit 2 compressed layers"):
        HiveCache.for_model(model, "snapkv@60/zigzag", profile([0.1, 0.3, 0.2], mine))
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, "snapkv@60/zigzag", profile([0.1, 0.3], "other"))


def test_layers_without_a_limit_take_their_need_along() -> None:
    facts = Facts(2, 1, 500, profile([0.1, 0.7, 0.3]), places=(0, 2))
    assert ZigZag(bound=0.0).shares(facts, 48, 9)[:, 0].tolist() == [8 + 20, 8 + 60]


def test_one_layer_is_snapkv() -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    ids = random_ids(1, 150)
    given_profile = profile([0.4], ModelFacts.of(model).fingerprint)
    ours = HiveCache.for_model(model, "snapkv(window=8)@60/zigzag", given_profile)
    plain = HiveCache.for_model(model, "snapkv(window=8)@60")
    assert torch.equal(read(model, ours, ids, 120), read(model, plain, ids, 120))
    assert kept_sets(ours) == kept_sets(plain)


def test_rows_are_shared_out_by_their_own_length() -> None:
    model = tiny_llama()
    given_profile = profile([0.1, 0.5], ModelFacts.of(model).fingerprint)
    rows = [random_ids(90, seed=1), random_ids(130, seed=2)]
    ids, mask = left_padded(rows)
    cache = HiveCache.for_model(model, "snapkv(window=8)@80/zigzag", given_profile)
    read(model, cache, ids, 130, mask)
    lengths = [[len(layer[0]) for layer in kept_sets(cache, row)] for row in (0, 1)]
    alone = []
    for row in rows:
        one = HiveCache.for_model(model, "snapkv(window=8)@80/zigzag", given_profile)
        read(model, one, row[None], len(row))
        alone.append([len(layer[0]) for layer in kept_sets(one)])
    assert lengths == alone
    assert [sum(one) for one in alone] == [160, 160]
    assert alone[0] == [70, 90]
