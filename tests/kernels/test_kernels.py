"""The fast kernel against the obvious one, on shapes of every kind, and its scratch memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvhive.kernels import NOTHING, Needs, attend, reference
from kvhive.kernels.chunked import CHUNK, span

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `attend`: any batch, groups, lengths, padding, empty slots and needs."""
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
        values=draw(st.booleans()),
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
    return {
        "query": normal(batch, kv_heads * group, q, width),
        "keys": normal(batch, kv_heads, n, width),
        "values": normal(batch, kv_heads, n, width + draw(st.integers(0, 1))),
        "scale": draw(st.sampled_from([0.1, 0.5, 1.0])),
        "needs": needs,
        "valid": valid,
        "real": real,
    }


def close(ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> bool:
    """Both absent, or of one shape and within the tolerance, relative to the largest number."""
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape:
        return False
    difference = (ours.double() - theirs.double()).abs().amax()
    return bool(difference <= tolerance * theirs.double().abs().amax().clamp_min(1))


@given(case=cases(), spare=st.sampled_from([0, 0, 1, 60]))
@settings(max_examples=150, deadline=None)
def test_same_as_the_reference(case: dict[str, Any], spare: int) -> None:
    """`spare` slots behind those in use are read over and never seen."""
    expected, told = reference.attend(**case)
    used = case["keys"].shape[2]
    roomy = dict(case)
    for name in ("keys", "values"):
        room = torch.full((*case[name].shape[:2], spare, case[name].shape[3]), 3.0)
        roomy[name] = torch.cat([case[name], room.to(case[name].dtype)], dim=2)
    out, seen = attend(**roomy, used=used)
    tolerance = TOLERANCE[out.dtype]
    assert out.dtype == case["query"].dtype
    assert close(out, expected, tolerance)
    assert seen.fresh == told.fresh
    assert seen.scale == told.scale
    assert close(seen.columns, told.columns, tolerance)
    assert close(seen.rows, told.rows, tolerance)
    for name in ("keys", "values", "queries"):
        assert close(getattr(seen, name), getattr(told, name), 0.0)
    for report in (seen.columns, seen.rows):
        assert report is None or report.dtype == torch.float32


@pytest.mark.parametrize("q", [1, 5, CHUNK + 1])
def test_a_query_that_sees_nothing_gets_zeros(q: int) -> None:
    query, keys = torch.randn(2, 4, q, 8), torch.randn(2, 2, q + 3, 8)
    valid = torch.ones(2, 2, q + 3, dtype=torch.bool)
    valid[1] = False
    needs = Needs(columns="sum", last_rows=2)
    for kernel in (attend, reference.attend):
        out, seen = kernel(query, keys, keys, 0.3, needs, valid)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert bool(out.isfinite().all())
        assert seen.columns is not None
        assert seen.rows is not None
        assert float(seen.columns[1].abs().max()) == float(seen.rows[1].abs().max()) == 0
        assert float(seen.columns[0].sum()) == pytest.approx(4 * q, rel=1e-4)


@pytest.mark.parametrize("q", [1, 9])
def test_padded_queries_do_not_vote(q: int) -> None:
    query, keys = torch.randn(1, 4, q, 8), torch.randn(1, 2, 20, 8)
    real = torch.arange(q)[None] >= q // 2 + 1
    _, seen = attend(query, keys, keys, 0.3, Needs(columns="sum"), None, real)
    assert seen.columns is not None
    assert float(seen.columns.sum()) == pytest.approx(4 * int(real.sum()), rel=1e-4, abs=1e-6)


class Largest(TorchDispatchMode):
    """Watches every operation and remembers the largest tensor that any of them made."""

    elements = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and look at what came out."""
        result = operation(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


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
        attend(query, keys, keys, 0.25, needs, valid, real)
    assert watch.elements <= max(heads * CHUNK * n, heads * n * 16)
    assert watch.elements < heads * n * n / 4


def test_a_policy_that_needs_nothing_gets_the_fused_kernel() -> None:
    """Exactly torch's own numbers for a whole prompt."""
    query, keys, values = (
        torch.randn(2, 4, 90, 8),
        torch.randn(2, 2, 90, 8),
        torch.randn(2, 2, 90, 8),
    )
    out, seen = attend(query, keys, values, 0.3, NOTHING)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert torch.equal(out, expected)
    assert (seen.columns, seen.rows, seen.keys, seen.values, seen.queries) == (None,) * 5


@given(used=st.integers(1, 100_000), spare=st.integers(0, 300))
def test_span_covers_what_is_used_in_few_sizes(used: int, spare: int) -> None:
    assert used <= span(used, used + spare) <= used + spare
    assert span(used, 10**6) - used < max(64, used / 4)


def test_span_has_few_sizes() -> None:
    assert len({span(used, 10**6) for used in range(1, 8193)}) <= 64
