"""The state of LESS against the same pair by pair, and a token at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kvhive.kernels import Ask, low_rank_reference
from kvhive.kernels.low_rank import LEAST, SLOTS, FeatureMaps, State, answer, beside, summed
from kvhive.kernels.segments import merge, segment
from kvhive.step import Step
from tests.stores.less_kernels import random_weights

SHAPES = [  # batch, KV heads, group, tokens, queries, key width, value width, rank
    (1, 1, 1, 5, 1, 4, 4, 1),
    (2, 3, 3, 33, 1, 8, 6, 8),
    (3, 2, 4, 64, 7, 5, 9, 3),
    (1, 2, 1, 129, 33, 8, 8, 16),
]


def gelu(x: float) -> float:
    """Exact, by the error function."""
    return float(x * 0.5 * (1 + torch.erf(torch.tensor(x / 2**0.5).double())))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
def test_features_are_what_the_card_says(heads: int, kv_heads: int) -> None:
    """One vector at a time, in plain Python."""
    weights = random_weights(heads=heads, kv_heads=kv_heads, width=4, rank=3, hidden=5)
    maps = FeatureMaps(**weights)
    inputs = torch.randn(2, heads, 3, 4), torch.randn(2, kv_heads, 3, 4)
    queries, keys = maps.of_queries(inputs[0]), maps.of_keys(inputs[1])
    assert queries.shape == (2, heads, 3, 3)
    assert keys.shape == (2, kv_heads, 3, 3)

    def plain(vector: Tensor, into: Tensor, out: Tensor) -> Tensor:
        hidden = torch.tensor([gelu(float(vector @ column)) for column in into.T])
        return torch.tensor([gelu(float(hidden @ column)) for column in out.T])

    for row in range(2):
        for head in range(heads):
            query = weights["query_in"][head], weights["query_out"][head]
            expected = plain(inputs[0][row, head, 1], *query).abs()
            assert torch.allclose(queries[row, head, 1], expected, atol=1e-5)
        for head in range(kv_heads):
            key = weights["key_in"][head], weights["key_out"][head]
            first = weights["key_gain"][head].abs() * plain(inputs[1][row, head, 2], *key)
            second = (first @ weights["key_mix"][head]) * weights["mix_gain"][head]
            assert torch.allclose(keys[row, head, 2], (first + second).abs(), atol=1e-5)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_state_and_exact_part_are_the_form_by_pairs(sizes: tuple[int, ...], seed: int) -> None:
    """Card, test 6: any tokens may be folded, in any order, whatever the groups."""
    batch, kv_heads, group, n, q, width, value, rank = sizes
    torch.manual_seed(seed)
    heads = kv_heads * group
    maps = FeatureMaps(**random_weights(heads=heads, kv_heads=kv_heads, width=width, rank=rank))
    keys, values = torch.randn(batch, kv_heads, n, width), torch.randn(batch, kv_heads, n, value)
    query = torch.randn(batch, heads, q, width)
    dropped = torch.rand(batch, kv_heads, n) < 0.7
    dropped[:, :, -1] = False
    state = State.empty(batch, kv_heads, rank, value, query.device)
    for part in (dropped & (torch.arange(n) % 3 == turn) for turn in (2, 0, 1)):
        state.fold(maps, keys, values, part)
    ask = Ask(Step.plain(n, q), 0.4, valid=~dropped, causal=False)
    exact = segment(query, keys, values, ask)
    answered = state.answer(maps.of_queries(query))
    ours = beside(*exact, answered)
    assert torch.allclose(ours, merge([exact, answered])[0], atol=1e-5)
    mask = (~dropped).repeat_interleave(group, 1)[:, :, None].expand(-1, -1, q, -1)
    expected = low_rank_reference.attend(query, keys, values, maps, mask, ~mask, 0.4)
    assert torch.allclose(ours, expected, atol=1e-3)
    assert float((ours - exact[0]).abs().max()) > 1e-3 or n < 9, "the state must say something"


def test_long_prompts_are_folded_a_part_at_a_time() -> None:
    maps = FeatureMaps(**random_weights(heads=2, kv_heads=1, width=4))
    keys, values = torch.randn(1, 1, SLOTS + 9, 4), torch.randn(1, 1, SLOTS + 9, 4)
    dropped = torch.rand(1, 1, SLOTS + 9) < 0.5
    state = State.empty(1, 1, 8, 4, keys.device)
    state.fold(maps, keys, values, dropped)
    expected = summed(maps.of_keys(keys), values, dropped)
    assert torch.allclose(state.values, expected[0], rtol=1e-4, atol=1e-2)
    assert torch.allclose(state.total, expected[1], rtol=1e-4)


def test_empty_slots_may_hold_anything() -> None:
    """Padding is multiplied by nothing, not by zero."""
    maps = FeatureMaps(**random_weights(heads=1, kv_heads=1, width=4))
    keys = torch.randn(1, 1, 5, 4)
    values = torch.randn(1, 1, 5, 4)
    keys[:, :, 1], values[:, :, 3] = float("nan"), float("inf")
    held = torch.tensor([[[True, False, True, False, True]]])
    state = State.empty(1, 1, 8, 4, keys.device)
    state.fold(maps, keys, values, held)
    alone = State.empty(1, 1, 8, 4, keys.device)
    alone.fold(maps, keys[:, :, ::2], values[:, :, ::2], held[:, :, ::2])
    assert torch.allclose(state.values, alone.values, rtol=1e-4, atol=1e-4)


def test_an_empty_state_says_nothing_and_a_faint_one_is_clamped() -> None:
    features = torch.rand(2, 2, 3, 4)
    values, total = torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 4)
    total[1] = 1e-12
    out, lse = answer(features, values, total)
    assert bool((lse[0] == float("-inf")).all())
    assert torch.allclose(lse[1], torch.tensor(LEAST).log())
    assert not out.isnan().any()


def test_parts_that_say_nothing_count_nothing() -> None:
    never = torch.full((1, 1, 1), float("-inf"))
    some = torch.zeros(1, 1, 1)
    out, rest = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 5.0]]]])
    assert torch.equal(beside(out, some, (rest, never)), out)
    assert torch.equal(beside(out, never, (rest, some)), rest)
    assert torch.equal(beside(0 * out, never, (rest, never)), 0 * out)
    assert torch.equal(beside(out, some, (rest, some)), (out + rest) / 2)


def test_copies_share_the_maps() -> None:
    maps = FeatureMaps(**random_weights(heads=1, kv_heads=1, width=4))
    assert copy.deepcopy(maps) is maps
