"""The most that any query gives a slot: the fast way against the obvious one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import Ask, peaks, reference
from kvhive.kernels.chunked import CHUNK
from kvhive.step import Step
from tests.support import Largest

from .test_kernels import TOLERANCE, padded_step


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_it_is_the_maximum_over_queries_and_group(data: st.DataObject) -> None:
    """Any batch, groups, lengths, padding, empty slots and dtypes."""
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    group, q = (
        data.draw(st.sampled_from([1, 2, 3])),
        data.draw(st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])),
    )
    n = q + data.draw(st.sampled_from([0, 1, 7, 40, 130]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(batch, kv_heads * group, q, 8, generator=source).to(dtype)
    keys = torch.randn(batch, kv_heads, n, 8, generator=source).to(dtype)
    step, valid = Step.plain(0, q, "verify"), None
    if data.draw(st.booleans()):
        empty = torch.randint(0, q + 1, (batch, 1), generator=source)
        step = padded_step(torch.arange(q) >= empty)
        assert step.real is not None
        valid = torch.rand(batch, kv_heads, n, generator=source) < 0.8
        valid[:, :, n - q :] = step.real[:, None]
    ask = Ask(step, 0.7, valid=valid)
    fast, slow = peaks(query, keys, ask), reference.peaks(query, keys, ask)
    assert fast.dtype == torch.float32
    assert torch.allclose(fast, slow, atol=TOLERANCE[dtype] / 3)
    if valid is not None:
        assert not bool(fast[~valid].any())


@pytest.mark.parametrize("q", [256, 512])
def test_no_matrix_of_all_queries_is_held(q: int) -> None:
    """Scratch grows with the slots, not with the queries."""
    query, keys = torch.randn(1, 4, q, 8), torch.randn(1, 2, 600, 8)
    with Largest() as watch:
        peaks(query, keys, Ask(Step.plain(0, q), 0.3))
    assert watch.elements <= 4 * CHUNK * 600
