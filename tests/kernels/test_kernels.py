"""The fast kernel against the obvious one, on shapes of every kind, and its scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import NOTHING, Ask, Needs, Observed, attend, reference, report, segments
from kvhive.kernels.chunked import CHUNK, span
from kvhive.step import Step
from tests.support import Largest

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)


@dataclass
class Case:
    """Arguments of `attend`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    ask: Ask

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Without what is asked."""
        return self.query, self.keys, self.values


def padded_step(real: Tensor) -> Step:
    """A step of which bool `[b, q]` is no padding."""
    return Step("prefill", real.shape[1], real.cumsum(1) - 1, real.shape[1] - 1, real.sum(1), real)


def asking(
    query: Tensor,
    needs: Needs = NOTHING,
    valid: Tensor | None = None,
    real: Tensor | None = None,
    scale: float = 0.3,
) -> Ask:
    """Of a step of as many tokens as there are queries."""
    step = Step.plain(0, query.shape[2]) if real is None else padded_step(real)
    return Ask(step, scale, needs, valid)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any batch, groups, lengths, padding, empty slots and needs."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, width = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([2, 8, 9]))
    q = draw(st.sampled_from(LENGTHS))
    n = q + draw(st.sampled_from([0, 1, 7, 70]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    source = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(dtype)

    needs = Needs(
        columns=draw(st.sampled_from([None, "sum", "square"])),
        fold=draw(st.booleans()),
        decay=draw(st.sampled_from([1.0, 0.9])),
        last_rows=draw(st.sampled_from([0, 1, 5, CHUNK + 3, 1000])),
        keys=draw(st.booleans()),
        queries=draw(st.booleans()),
    )
    valid = real = None
    if draw(st.booleans()):
        empty = torch.randint(0, n + 1, (batch, kv_heads, 1), generator=source)
        valid = torch.arange(n) >= empty
    if draw(st.booleans()):
        padding = torch.randint(0, q + 1, (batch, 1), generator=source)
        real = torch.arange(q) >= padding
        shown = torch.ones(batch, kv_heads, n, dtype=torch.bool) if valid is None else valid
        valid = shown & torch.nn.functional.pad(real, (n - q, 0), value=True)[:, None]
    query = normal(batch, kv_heads * group, q, width)
    keys = normal(batch, kv_heads, n, width)
    values = normal(batch, kv_heads, n, width + draw(st.integers(0, 1)))
    scale = draw(st.sampled_from([0.1, 0.5, 1.0]))
    return Case(query, keys, values, asking(query, needs, valid, real, scale))


def close(ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> bool:
    """Both absent, or of one shape and within the tolerance, relative to the largest number."""
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape:
        return False
    difference = (ours.double() - theirs.double()).abs().amax()
    return bool(difference <= tolerance * theirs.double().abs().amax().clamp_min(1))


def agree(ours: Observed, theirs: Observed, tolerance: float) -> None:
    """Two reports of the same step."""
    assert ours.fresh == theirs.fresh
    assert ours.scale == theirs.scale
    assert close(ours.columns, theirs.columns, tolerance)
    assert (ours.rows is None) == (theirs.rows is None)
    if ours.rows is not None and theirs.rows is not None:
        assert ours.rows.count == theirs.rows.count
        assert close(ours.rows.all(), theirs.rows.all(), tolerance)
        assert ours.rows.all().dtype == torch.float32
    assert ours.columns is None or ours.columns.dtype == torch.float32
    assert close(ours.queries, theirs.queries, 0.0)


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_same_as_the_reference(case: Case) -> None:
    expected, told = reference.attend(*case.tensors, case.ask)
    out, seen = attend(*case.tensors, case.ask)
    tolerance = TOLERANCE[out.dtype]
    assert out.dtype == case.query.dtype
    assert close(out, expected, tolerance)
    agree(seen, told, tolerance)
    assert close(seen.keys, told.keys, 0.0)
    agree(report(case.query, case.keys, case.ask), told, tolerance)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_log_sum_exp_comes_where_it_is_asked_for(case: Case) -> None:
    ask = replace(case.ask, lse=True)
    expected, told = reference.attend(*case.tensors, ask)
    out, seen = attend(*case.tensors, ask)
    tolerance = TOLERANCE[out.dtype]
    assert out.dtype == case.query.dtype
    assert close(out, expected, tolerance)
    agree(seen, told, tolerance)
    assert close(seen.keys, told.keys, 0.0)
    assert seen.lse is not None
    assert told.lse is not None
    assert seen.lse.dtype == torch.float32
    assert torch.allclose(seen.lse.double(), told.lse, atol=tolerance)
    assert attend(*case.tensors, case.ask)[1].lse is None


@given(case=cases(), cuts=st.lists(st.floats(0, 1), max_size=3))
@settings(max_examples=100, deadline=None)
def test_segments_merge_to_the_whole(case: Case, cuts: list[float]) -> None:
    """Older slots in any number of parts; the step's own tokens are the last one's."""
    older = case.keys.shape[2] - case.query.shape[2]
    edges = sorted({0, *(round(cut * older) for cut in cuts), case.keys.shape[2]})
    parts = [
        (case.keys[:, :, a:b], case.values[:, :, a:b], segments.of_part(case.ask, a, b, b > older))
        for a, b in pairwise(edges)
    ]
    expected, told = reference.attend(*case.tensors, case.ask)
    tolerance = TOLERANCE[case.query.dtype]
    for kernel, slack in ((segments, tolerance), (reference, 1e-9)):
        found = [kernel.segment(case.query, keys, values, ask) for keys, values, ask in parts]
        out, lse = kernel.merge(found)
        assert close(out, expected.to(out.dtype), tolerance)
        seen = [kernel.report(case.query, keys, lse, ask) for keys, _, ask in parts]
        if told.columns is not None:
            columns = [one.columns for one in seen if one.columns is not None]
            assert close(torch.cat(columns, -1), told.columns, max(slack, 1e-6))
        if told.rows is not None:
            rows = [one.rows.all() for one in seen if one.rows is not None]
            assert close(torch.cat(rows, -1), told.rows.all(), max(slack, 1e-6))


@pytest.mark.parametrize("q", [1, 5, CHUNK + 1])
def test_a_query_that_sees_nothing_gets_zeros(q: int) -> None:
    query, keys = torch.randn(2, 4, q, 8), torch.randn(2, 2, q + 3, 8)
    valid = torch.ones(2, 2, q + 3, dtype=torch.bool)
    valid[1] = False
    ask = asking(query, Needs(columns="sum", last_rows=2), valid)
    for kernel in (attend, reference.attend):
        out, seen = kernel(query, keys, keys, ask)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert bool(out.isfinite().all())
        assert seen.columns is not None
        assert seen.rows is not None
        assert float(seen.columns[1].abs().max()) == float(seen.rows.all()[1].abs().max()) == 0
        assert float(seen.columns[0].sum()) == pytest.approx(4 * q, rel=1e-4)


@pytest.mark.parametrize("q", [1, 9])
def test_padded_queries_do_not_vote(q: int) -> None:
    query, keys = torch.randn(1, 4, q, 8), torch.randn(1, 2, 20, 8)
    real = torch.arange(q)[None] >= q // 2 + 1
    _, seen = attend(query, keys, keys, asking(query, Needs(columns="sum"), None, real))
    assert seen.columns is not None
    assert float(seen.columns.sum()) == pytest.approx(4 * int(real.sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("q", [1, 9, CHUNK + 3])
@pytest.mark.parametrize("needs", [NOTHING, Needs(columns="sum")], ids=["plain", "columns"])
def test_products_beyond_half_precision_stay_finite(q: int, needs: Needs) -> None:
    """Keys and queries whose products of 1e5 and more float16 cannot hold; sdpa copes."""
    source = torch.Generator().manual_seed(0)
    query, keys, values = (
        (size * torch.randn(1, heads, length, 64, generator=source)).half()
        for size, heads, length in ((200.0, 4, q), (200.0, 2, q + 60), (1.0, 2, q + 60))
    )
    assert float((query[:, :2].float() @ keys.float().mT).abs().max()) > 1e5
    ask = asking(query, needs, scale=64**-0.5)
    out, _ = attend(query, keys, values, ask)
    expected, _ = reference.attend(query.double(), keys.double(), values.double(), ask)
    assert close(out, expected, TOLERANCE[torch.float16])


@pytest.mark.parametrize("q", [1, CHUNK + 3])
def test_logits_are_not_rounded_to_half_precision(q: int) -> None:
    """No further from the truth than torch's own kernel, at logits of which bfloat16 holds few
    digits.
    """
    source = torch.Generator().manual_seed(0)
    query, keys, values = (
        (size * torch.randn(1, heads, length, 64, generator=source)).bfloat16()
        for size, heads, length in ((6.0, 4, q), (2.0, 2, 700), (1.0, 2, 700))
    )
    ask = asking(query, Needs(columns="sum"), scale=64**-0.5)
    wide = [tensor.double() for tensor in (query, keys, values)]
    expected, told = reference.attend(*wide, ask)
    visible = torch.ones(q, 700, dtype=torch.bool).tril(700 - q)
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=ask.scale, enable_gqa=True
    )
    out, seen = attend(query, keys, values, ask)
    ours, theirs = ((one.double() - expected).abs().max() for one in (out, stock))
    assert float(ours) <= 1.5 * float(theirs)
    assert close(seen.columns, told.columns, 1e-4)


@pytest.mark.parametrize(
    "needs",
    [NOTHING, Needs(columns="sum"), Needs(columns="square", fold=False), Needs(last_rows=8)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_no_matrix_of_all_pairs_is_held(needs: Needs, padded: bool) -> None:
    heads, n = 8, 1024
    query, keys = torch.randn(1, heads, n, 16), torch.randn(1, 2, n, 16)
    real = torch.arange(n)[None] >= 3 if padded else None
    valid = real[:, None].expand(1, 2, n) if real is not None else None
    with Largest() as watch:
        _, seen = attend(query, keys, keys, asking(query, needs, valid, real))
        if seen.rows is not None:
            seen.rows.all()
    assert watch.elements <= max(heads * CHUNK * n, heads * n * 16)
    assert watch.elements < heads * n * n / 4


def test_a_policy_that_needs_nothing_gets_the_fused_kernel() -> None:
    """Exactly torch's own numbers for a whole prompt."""
    query, keys, values = (
        torch.randn(2, 4, 90, 8),
        torch.randn(2, 2, 90, 8),
        torch.randn(2, 2, 90, 8),
    )
    out, seen = attend(query, keys, values, asking(query))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert torch.equal(out, expected)
    assert (seen.columns, seen.rows, seen.keys, seen.queries) == (None,) * 4


@given(used=st.integers(1, 100_000), spare=st.integers(0, 300))
def test_span_covers_what_is_used_in_few_sizes(used: int, spare: int) -> None:
    assert used <= span(used, used + spare) <= used + spare
    assert span(used, 10**6) - used < max(64, used / 4)


def test_span_has_few_sizes() -> None:
    assert len({span(used, 10**6) for used in range(1, 8193)}) <= 64
