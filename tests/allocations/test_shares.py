"""What holds for the fixed shares of every allocation that needs no profile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhive.allocations import ALLOCATIONS, Allocation, Facts

OWN = [member() for member in ALLOCATIONS.values() if member.calibration is None]
MORE = [
    ALLOCATIONS["pyramid"](beta=3),
    ALLOCATIONS["pyramid"](beta=50, min_past=4),
    ALLOCATIONS["per_layer"](weights=(5.0, 1.0, 0.0, 2.0)),
]


@pytest.mark.parametrize("allocation", [*OWN, *MORE], ids=str)
@given(
    layers=st.integers(1, 9),
    heads=st.integers(1, 4),
    floor=st.integers(1, 40),
    above=st.integers(0, 60),
    seen=st.integers(0, 400),
)
def test_whole_numbers_an_exact_total_and_nobody_below_the_floor(
    allocation: Allocation, layers: int, heads: int, floor: int, above: int, seen: int
) -> None:
    layers = len(getattr(allocation, "weights", ())) or layers
    shares = allocation.shares(Facts(layers, heads, seen), floor + above, floor)
    assert shares.shape == (layers, heads)
    assert shares.dtype == torch.int64
    assert int(shares.sum()) == (floor + above) * layers * heads
    assert int(shares.min()) >= floor
    assert int(shares.max()) <= max(seen, floor + above) or seen <= floor + above
