"""Global: one pool for all heads of all layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvhive.allocations import ALLOCATIONS, Facts
from kvhive.cache.hive_cache import HiveCache
from tests.allocations.competition import drawn, share_out, sure_of
from tests.support import kept_sets, random_ids, read

Global = ALLOCATIONS["global"]
INF = float("inf")


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    rows=st.integers(1, 3),
    heads=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    floor=st.integers(1, 5),
)
def test_as_token_by_token(
    seed: int, layers: int, rows: int, heads: int, share: float, floor: int
) -> None:
    scores, limits = drawn(seed, layers, rows, heads)
    sure = [
        sure_of(score, limit, [[max(floor, int(x * share)) for x in row] for row in limit.tolist()])
        for score, limit in zip(scores, limits, strict=True)
    ]
    ours = Global(floor=share).at_eviction(scores, limits, floor)
    for mine, expected in zip(ours, share_out(scores, limits, sure), strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, expected)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), floor=st.integers(1, 5))
def test_total_floor_and_certain_tokens(seed: int, share: float, floor: int) -> None:
    scores, limits = drawn(seed, layers=3, rows=2, heads=2)
    shares = torch.stack(Global(floor=share).at_eviction(scores, limits, floor), 1)
    held = torch.stack([(score > -INF).sum(-1) for score in scores], 1)
    certain = torch.stack([(score == INF).sum(-1) for score in scores], 1)
    limit = torch.stack(limits, 1)
    assert torch.equal(shares.sum((1, 2)), limit.sum((1, 2)).minimum(held.sum((1, 2))))
    assert bool((shares <= held).all())
    least = (limit.double() * share).long().clamp_min(floor).maximum(certain)
    assert bool((shares >= least.minimum(limit).minimum(held)).all())


def test_ties_go_to_the_lower_layer_then_to_the_lower_head() -> None:
    scores = [torch.ones(1, 2, 6)] * 2
    limits = [torch.full((1, 2), 3)] * 2
    shares = Global(floor=0.0).at_eviction(scores, limits, 1)
    assert [share.tolist() for share in shares] == [[[6, 4]], [[1, 1]]]


def test_without_competition_all_are_alike() -> None:
    assert torch.equal(Global().shares(Facts(3, 2, 100), 17, 5), torch.full((3, 2), 17))


@pytest.mark.parametrize("policy", ["h2o", "snapkv(window=4)"])
def test_layers_of_a_model_trade(model: PreTrainedModel, policy: str) -> None:
    cache = HiveCache.for_model(model, f"{policy}@24/global")
    ids = random_ids(1, 140)
    read(model, cache, ids[:, :90], 90)
    kept = lengths(cache)
    assert int(kept.sum()) == 24 * 4
    assert len(kept.unique()) > 1
    assert int(kept.min()) >= int(24 * 0.2)
    for token in ids[0, 90:]:
        read(model, cache, token.view(1, 1), 1)
        assert int(lengths(cache).sum()) == 24 * 4


def lengths(cache: HiveCache) -> torch.Tensor:
    """int64 `[layers, heads]`: tokens held."""
    return torch.tensor([[len(head) for head in layer] for layer in kept_sets(cache)])
