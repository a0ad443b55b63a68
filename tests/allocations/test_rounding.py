"""Whole shares by weight: exact total, within bounds, as near to proportional as can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvhive.allocations._rounding import apportion, largest_remainder

weights_of = st.lists(
    st.floats(0, 1e3) | st.integers(0, 3).map(float) | st.floats(1e-9, 1e-6),
    min_size=1,
    max_size=12,
)


@given(weights=weights_of, least=st.integers(0, 5), room=st.integers(0, 30), data=st.data())
def test_exact_within_bounds_and_in_order(
    weights: list[float], least: int, room: int, data: st.DataObject
) -> None:
    count = len(weights)
    total = data.draw(st.integers(least * count, (least + room) * count))
    shares = apportion(torch.tensor(weights), total, least, least + room)
    assert shares.dtype == torch.int64
    assert int(shares.sum()) == total
    assert least <= int(shares.min())
    assert int(shares.max()) <= least + room
    ordered = shares[torch.tensor(weights, dtype=torch.float64).argsort(stable=True)]
    assert bool((ordered.diff() >= -1).all())


@given(weights=weights_of, least=st.integers(0, 5), room=st.integers(1, 30), data=st.data())
def test_as_by_bisection(weights: list[float], least: int, room: int, data: st.DataObject) -> None:
    count = len(weights)
    total = data.draw(st.integers(least * count, (least + room) * count))
    if max(weights) < 1e-100 or min(weights) < 1e-3 * max(weights):
        return
    shares = apportion(torch.tensor(weights, dtype=torch.float64), total, least, least + room)
    real = bisected(torch.tensor(weights, dtype=torch.float64), total, least, least + room)
    assert float((shares - real).abs().max()) < 1 + 1e-6


def bisected(weights: Tensor, total: int, least: int, most: int) -> Tensor:
    """The real shares, by halving the interval in which the level lies."""
    low, high = 0.0, (most + 1) / float(weights.min())
    for _ in range(200):
        level = (low + high) / 2
        if float((level * weights).clamp(least, most).sum()) < total:
            low = level
        else:
            high = level
    return (high * weights).clamp(least, most)


def test_proportional_where_nothing_is_in_the_way() -> None:
    assert apportion(torch.tensor([1, 2, 3]), 60).tolist() == [10, 20, 30]
    assert apportion(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 10).tolist() == [[3, 3], [2, 2]]
    assert apportion(torch.tensor([0.1] * 7), 70).tolist() == [10] * 7


def test_those_at_an_end_leave_the_rest_to_others() -> None:
    assert apportion(torch.tensor([8, 1, 1]), 30, 0, 12).tolist() == [12, 9, 9]
    assert apportion(torch.tensor([8, 1, 1]), 30, 5).tolist() == [20, 5, 5]
    assert apportion(torch.tensor([1, 0, 0]), 30, 0, 12).tolist() == [12, 9, 9]
    assert apportion(torch.tensor([0, 0]), 9).tolist() == [5, 4]
    assert apportion(torch.tensor([1, 1]), 9, torch.tensor([6, 0])).tolist() == [6, 3]


@pytest.mark.parametrize(("total", "most"), [(2, None), (50, 12)])
def test_a_total_that_does_not_fit_is_refused(total: int, most: int | None) -> None:
    with pytest.raises(ValueError, match=f"{total} tokens cannot be shared out"):
        apportion(torch.ones(3), total, 1, most)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 97))
def test_the_largest_remainders_are_rounded_up(parts: list[int], scale: int) -> None:
    total = sum(parts) // scale
    real = torch.tensor(parts, dtype=torch.float64) * (total / max(1, sum(parts)))
    whole = largest_remainder(real, total)
    assert int(whole.sum()) == total
    lost = real - whole
    assert bool((lost.abs() < 1 + 1e-6).all())
    if bool((lost < -1e-6).any()):
        assert float((1 + lost[lost < -1e-6]).min()) >= float(lost.max()) - 1e-6
