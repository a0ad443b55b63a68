"""Ada-KV: the heads of a layer share its budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.allocations.ada import Ada
from kvhive.cache.hive_cache import HiveCache
from tests.allocations.competition import drawn, share_out, sure_of
from tests.support import kept_sets, left_padded, random_ids, read

INF = math.inf


def least_of(scores: Tensor, limits: Tensor, share: float, floor: int) -> list[list[int]]:
    """What stays anyway, and a part of the rest of each head's limit; the policy's floor."""
    return [
        [
            max(floor, certain + int((int(limit) - certain) * share))
            for values, limit in zip(heads, limits[row], strict=True)
            for certain in [min(sum(v == INF for v in values), int(limit))]
        ]
        for row, heads in enumerate(scores.tolist())
    ]


def normalized(scores: Tensor, limits: Tensor) -> Tensor:
    """Each head's scores times the part of their sum that its best tokens hold."""
    result = scores.clone()
    for row, heads in enumerate(scores.tolist()):
        for head, values in enumerate(heads):
            certain = sum(v == INF for v in values)
            mass = sorted((v for v in values if 0 < v < INF), reverse=True)
            best = sum(mass[: max(0, int(limits[row, head]) - certain)])
            if mass:
                finite = result[row, head].abs() < INF
                result[row, head][finite] *= torch.tensor(best / sum(mass))
    return result


@pytest.mark.parametrize("normalize", [True, False])
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    rows=st.integers(1, 3),
    heads=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    floor=st.integers(1, 5),
)
def test_as_token_by_token(
    normalize: bool, seed: int, layers: int, rows: int, heads: int, share: float, floor: int
) -> None:
    scores, limits = drawn(seed, layers, rows, heads)
    ours = Ada(share, normalize).at_eviction(scores, limits, floor)
    for mine, score, limit in zip(ours, scores, limits, strict=True):
        worth = normalized(score, limit) if normalize else score
        sure = sure_of(score, limit, least_of(score, limit, share, floor))
        (expected,) = share_out([worth], [limit], [sure])
        assert mine.dtype == torch.int64
        assert torch.equal(mine, expected)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), normalize=st.booleans())
def test_the_total_of_a_layer_is_exact_and_every_head_has_its_part(
    seed: int, share: float, normalize: bool
) -> None:
    window, past, limit = 4, 40, 19
    scores = torch.rand(2, 3, past, generator=torch.Generator().manual_seed(seed))
    scores = torch.cat([scores, torch.full((2, 3, window), INF)], -1)
    (kept,) = Ada(share, normalize).at_eviction([scores], [torch.full((2, 3), limit)], window + 1)
    assert kept.sum(-1).tolist() == [3 * limit] * 2
    assert int(kept.min()) >= window + int(share * (limit - window))


def test_all_of_the_share_for_sure_is_uniform() -> None:
    scores, limits = torch.rand(2, 3, 30), torch.full((2, 3), 11)
    assert torch.equal(Ada(floor=1.0).at_eviction([scores], [limits], 1)[0], limits)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_heads_get_the_same_but_for_ties(normalize: bool) -> None:
    scores = torch.rand(2, 1, 30, generator=torch.Generator().manual_seed(3)).expand(-1, 3, -1)
    limits = torch.full((2, 3), 11)
    (kept,) = Ada(0.0, normalize).at_eviction([scores], [limits], 1)
    assert torch.equal(kept, limits)
    (kept,) = Ada(0.0, normalize).at_eviction([scores], [torch.tensor([[11, 11, 12]] * 2)], 1)
    assert kept.tolist() == [[12, 11, 11]] * 2 or normalize


def test_heads_change_places_together_with_their_shares() -> None:
    scores = torch.rand(1, 5, 30, generator=torch.Generator().manual_seed(3)).square()
    scores[:, 1:3] *= 0.3
    limits, order = torch.full((1, 5), 9), torch.tensor([3, 0, 4, 1, 2])
    for ada in (Ada(), Ada(0.1, normalize=False), Ada(counting="reference")):
        (kept,) = ada.at_eviction([scores], [limits], 1)
        (moved,) = ada.at_eviction([scores[:, order]], [limits], 1)
        assert torch.equal(moved, kept[:, order])
        assert len(kept.unique()) > 2


def test_spread_attention_gives_way_when_normalized() -> None:
    """Sums of attention: one head looks at few tokens, the other at all a little."""
    sharp = torch.tensor([4.0, 3.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    spread = torch.full((10,), 0.87)
    scores, limits = torch.stack([sharp, spread])[None], torch.full((1, 2), 4)
    (plain,) = Ada(0.0, normalize=False).at_eviction([scores], [limits], 1)
    assert plain.tolist() == [[3, 5]]
    scores[0, 1] = 1.2
    (plain,) = Ada(0.0, normalize=False).at_eviction([scores], [limits], 1)
    (damped,) = Ada(0.0).at_eviction([scores], [limits], 1)
    assert plain.tolist() == [[2, 6]]
    assert damped.tolist() == [[3, 5]]


def test_scores_below_zero_are_not_normalized() -> None:
    scores = -torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(3))
    limits = torch.full((2, 3), 11)
    with_it, without = (Ada(0.1, each).at_eviction([scores], [limits], 1) for each in (True, False))
    assert torch.equal(with_it[0], without[0])


@pytest.mark.parametrize("counting", ["exact", "reference"])
def test_what_fits_stays(counting: str) -> None:
    scores = torch.rand(2, 2, 8)
    scores[0, 0, :3] = -INF
    limits = torch.tensor([[6, 7], [4, 4]])
    (kept,) = Ada(counting=counting).at_eviction([scores], [limits], 1)  # type: ignore[arg-type]
    assert kept[0].tolist() == [5, 8]
    assert int(kept[1].sum()) in range(6, 10)


@pytest.mark.parametrize("policy", ["h2o(recent=4)", "snapkv(window=4)", "keydiff", "buzz"])
def test_heads_of_a_layer_trade(model: PreTrainedModel, policy: str) -> None:
    ids = random_ids(1, 140)
    cache = HiveCache.for_model(model, f"{policy}@40/ada")
    read(model, cache, ids[:, :90], 90)
    uneven = False
    for token in [*ids[0, 90:], None]:
        kept = lengths(cache)
        uneven |= bool((kept[:, 0] != kept[:, 1]).any())
        assert int(kept.sum(-1).max()) <= 2 * 40
        assert int(kept.min()) >= int(40 * 0.2) // 2
        if token is not None:
            read(model, cache, token.view(1, 1), 1)
    assert uneven


def lengths(cache: HiveCache, row: int = 0) -> Tensor:
    """int64 `[layers, heads]`: tokens held."""
    return torch.tensor([[len(head) for head in layer] for layer in kept_sets(cache, row)])


@pytest.mark.parametrize("allocation", ["ada", "global"])
@pytest.mark.parametrize("slack", [0, 7])
def test_rows_go_down_each_on_its_own(model: PreTrainedModel, allocation: str, slack: int) -> None:
    """A row that is within its limits loses nothing because another one is not."""
    rows = [random_ids(70, seed=1), random_ids(38, seed=2)]
    ids, mask = left_padded(rows)
    tail = random_ids(2, 30, seed=3)
    recipe = f"h2o(recent=4, slack={slack})@40/{allocation}"
    batch = HiveCache.for_model(model, recipe)
    read(model, batch, torch.cat([ids, tail], 1), 70, mask)
    for row, own in enumerate(rows):
        alone = HiveCache.for_model(model, recipe)
        read(model, alone, torch.cat([own, tail[row]])[None], len(own))
        assert kept_sets(batch, row) == kept_sets(alone)


@pytest.mark.parametrize("allocation", ["ada", "global"])
def test_layers_that_are_left_whole_take_no_part(model: PreTrainedModel, allocation: str) -> None:
    for skipped, other in ((0, 1), (1, 0)):
        cache = HiveCache.for_model(model, f"l2norm(skip_layers=[{skipped}])@24/{allocation}")
        read(model, cache, random_ids(1, 100), 80)
        kept = lengths(cache)
        assert kept[skipped].tolist() == [100, 100]
        assert 2 * 20 <= int(kept[other].sum()) <= 2 * 24
