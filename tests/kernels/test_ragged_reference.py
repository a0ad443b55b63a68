"""The obvious kernel for ragged rows against the obvious one for rows of one length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Ask, Needs, ragged_reference, reference
from kvhive.step import Step
from tests.kernels.ragged_cases import Case, case, lengths, needs


def padded(flat: Tensor, of: Case, row: int) -> Tensor:
    """One row of `[S, d]` as `[1, 1, length, d]`."""
    start, length = int(of.extents.starts[row]), int(of.extents.lengths[row])
    return flat[None, None, start : start + length]


@given(
    rows=lengths(st.integers(0, 9)),
    group=st.sampled_from([1, 3, 4]),
    q=st.sampled_from([1, 2, 5]),
    needs=needs(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_row_is_attended_as_if_alone(
    rows: list[list[int]], group: int, q: int, needs: Needs, masked: bool, seed: int
) -> None:
    grown = [[length + q for length in heads] for heads in rows]
    one = case(grown, group, (6, 5), torch.float64, q, seed, needs, padded=masked)
    out, lse = ragged_reference.attend(*one.tensors, one.extents, one.scale)
    seen = ragged_reference.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)
    queries, valid = one.query.unflatten(1, (-1, group)), one.extents.valid
    for row in range(len(one.extents.starts)):
        place = divmod(row, len(grown[0]))
        shown = None if valid is None else padded(valid[:, None], one, row)[..., 0]
        ask = Ask(Step.plain(0, q), one.scale, one.needs, shown)
        arguments = queries[place][None], *(padded(flat, one, row) for flat in one.tensors[1:])
        expected, told = reference.attend(*arguments, ask)
        assert torch.allclose(out.unflatten(1, (-1, group))[place], expected[0])
        whole = reference.segment(*arguments, ask)[1]
        assert torch.allclose(lse.unflatten(1, (-1, group))[place], whole[0])
        start = int(one.extents.starts[row])
        stop = start + int(one.extents.lengths[row])
        assert (seen.columns is None) == (told.columns is None)
        if seen.columns is not None and told.columns is not None:
            mine = seen.columns[..., start:stop].view_as(told.columns)
            assert torch.allclose(mine, told.columns, atol=1e-7)
        assert (seen.rows is None) == (told.rows is None)
        if seen.rows is not None and told.rows is not None:
            mine = seen.rows[None, ..., start:stop]
            assert torch.allclose(mine, told.rows.all(), atol=1e-7)


def test_slots_of_no_row_receive_nothing() -> None:
    one = case([[3, 0, 5]], group=2, seed=1, needs=Needs(columns="sum", fold=False, last_rows=1))
    out, lse = ragged_reference.attend(*one.tensors, one.extents, one.scale)
    seen = ragged_reference.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)
    unused = one.keys[:, 0].isnan()
    assert int(unused.sum()) > 0
    assert seen.columns is not None
    assert seen.rows is not None
    assert float(seen.columns[:, unused].abs().max()) == 0
    assert float(seen.rows[..., unused].abs().max()) == 0
    assert torch.allclose(seen.columns.sum(-1), torch.full((2,), 2.0))
    assert torch.equal(out[:, 2:4], torch.zeros(1, 2, 1, 64))
    assert bool(lse[:, 2:4].isneginf().all())


@pytest.mark.parametrize("fold", [True, False])
def test_what_is_not_asked_is_not_told(fold: bool) -> None:
    one = case([[3, 5]], needs=Needs(fold=fold))
    _, lse = ragged_reference.attend(*one.tensors, one.extents, one.scale)
    seen = ragged_reference.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)
    assert (seen.columns, seen.rows) == (None, None)
