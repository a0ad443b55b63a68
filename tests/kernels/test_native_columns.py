"""The attention that keys receive, in C: against the obvious formula in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Ask, Needs, attend, chunked, native, native_columns, reference, report
from kvhive.step import Step

compiled = pytest.mark.skipif(native.loaded() is None, reason="the C kernels are not compiled here")
MACHINES = [
    (4, False),
    (8, False),
    (16, False),
    (16, True),
]  # floats in a vector; tiles of bfloat16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SUMS = Needs(columns="sum")
TOLERANCE = 2e-5  # of the largest column: what float32 loses in products and sums


@dataclass
class Case:
    """Arguments of `report`."""

    query: Tensor
    keys: Tensor
    ask: Ask

    def told(self) -> Tensor:
        """The columns in float64."""
        columns = reference.attend(self.query, self.keys, self.keys, self.ask)[1].columns
        assert columns is not None
        return columns


def case(
    q: int,
    n: int,
    heads: tuple[int, int, int] = (1, 2, 3),
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    needs: Needs = SUMS,
    causal: bool = True,
    scale: float = 0.2,
    seed: int = 0,
) -> Case:
    """Random tokens; the query is a view, as a model's projection leaves it, and keys have room
    behind them. heads: batch, KV heads, query heads of each.
    """
    batch, kv_heads, group = heads
    source = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, q, kv_heads * group, width, generator=source).to(dtype)
    keys = torch.randn(batch, kv_heads, n + 5, width, generator=source).to(dtype)
    keys[:, :, n:] = float("nan")
    ask = Ask(Step.plain(0, q), scale, needs, causal=causal)
    return Case(query.transpose(1, 2), keys[:, :, :n], ask)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any batch, groups, lengths, widths and needs."""
    q = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 300])))
    causal = draw(st.booleans())
    n = draw(st.sampled_from([0, 1, 7, 63, 200, 600])) + (q if causal else 1)
    return case(
        q,
        n,
        (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))),
        draw(st.sampled_from([1, 2, 9, 32, 64, 100])),
        draw(st.sampled_from(DTYPES)),
        Needs(columns=draw(st.sampled_from(["sum", "square"])), fold=draw(st.booleans())),
        causal,
        draw(st.sampled_from([0.01, 0.3, 3.0])),
        draw(st.integers(0, 10_000)),
    )


def check(made: Case) -> None:
    assert native_columns.serves(made.query, made.keys, made.ask)
    ours, theirs = native_columns.columns(made.query, made.keys, made.ask), made.told()
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    size = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * size)


@pytest.fixture(params=MACHINES, ids=str, scope="module")
def machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every set of instructions that this machine has."""
    lanes, tiles = request.param
    best, lent = native.lanes(), native_columns.tiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "lanes", lambda: min(lanes, best))
        patch.setattr(native_columns, "tiles", lambda: tiles and lent)
        yield


@compiled
@pytest.mark.usefixtures("machine")
@given(made=cases())
@settings(max_examples=60)
def test_same_as_the_reference(made: Case) -> None:
    check(made)


@compiled
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", DTYPES)
def test_widest_tokens_and_long_rows(dtype: torch.dtype) -> None:
    check(case(3, 1500, width=native.WIDEST, dtype=dtype, scale=0.05))


@compiled
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(dtype: torch.dtype) -> None:
    """Of 1e5 and more, where each query sees one slot alone, or a few that are equal."""
    made = case(70, 400, dtype=dtype, needs=Needs(columns="sum", fold=False))
    made.query = (made.query * 256).to(dtype)
    made.keys = (made.keys * 256).round().to(dtype)
    made.keys[:, :, 1::2] = made.keys[:, :, ::2]
    made.query = made.query.float().mul(2**-4).round().mul(2**4).to(dtype)  # exact products
    assert float((made.query[:, 0].float() @ made.keys[:, 0].float().mT).abs().max()) > 1e5
    check(made)


@compiled
@pytest.mark.usefixtures("machine")
def test_weights_that_float32_cannot_hold_are_zeros() -> None:
    made = case(1, 3, (1, 1, 1), width=1, dtype=torch.float32, scale=1.0)
    made.query, made.keys = (
        torch.ones(1, 1, 1, 1),
        torch.tensor([0.0, -80.0, -1e4]).view(1, 1, 3, 1),
    )
    ours = native_columns.columns(made.query, made.keys, made.ask)[0, 0]
    assert ours.tolist() == [1.0, pytest.approx(1.8048514e-35, rel=1e-5), 0.0]


@compiled
@pytest.mark.usefixtures("machine")
def test_what_is_no_number_is_not_hidden() -> None:
    """Whoever sees it gives no number to all that he sees, as in torch."""
    made = case(70, 100, (1, 1, 1), dtype=torch.float32, needs=Needs(columns="sum", fold=False))
    made.keys = made.keys.clone()
    made.keys[:, :, 95] = float("nan")
    ours = native_columns.columns(made.query, made.keys, made.ask)
    theirs = chunked.columns(made.query, made.keys, made.ask)
    assert theirs is not None
    assert torch.equal(ours.isnan(), theirs.isnan())


@compiled
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("q", [4, 700])
def test_threads_share_the_work(q: int, fold: bool) -> None:
    """Each number of them gives the same bits every time."""
    made = case(q, 3000, needs=Needs(columns="sum", fold=fold))
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            check(made)
            once = native_columns.columns(made.query, made.keys, made.ask)
            assert torch.equal(once, native_columns.columns(made.query, made.keys, made.ask))
    finally:
        torch.set_num_threads(before)


@compiled
def test_who_serves() -> None:
    """C takes plain steps, torch the rest."""
    made = case(5, 20, dtype=torch.float32)
    query, keys, ask = made.query, made.keys, made.ask
    real = torch.ones(1, 5, dtype=torch.bool)
    step = Step("prefill", 5, torch.arange(5)[None], 4, torch.tensor([5]), real)
    assert native_columns.serves(query, keys, ask)
    assert not native_columns.serves(query, keys, replace(ask, needs=Needs()))
    assert not native_columns.serves(query, keys, replace(ask, needs=Needs("sum", decay=0.9)))
    assert not native_columns.serves(query, keys, replace(ask, step=step))
    assert not native_columns.serves(query, keys, replace(ask, valid=keys[..., 0] > 0))
    assert not native_columns.serves(query.double(), keys.double(), ask)
    assert not native_columns.serves(query.half(), keys, ask)
    assert not native_columns.serves(query, keys.mT.contiguous().mT, ask)
    assert not native_columns.serves(query, keys[:, :, :4], ask)
    assert not native_columns.serves(query, keys.clone().requires_grad_(), ask)
    with torch.no_grad():
        assert native_columns.serves(query, keys.clone().requires_grad_(), ask)


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_is_attended_to_by_torch_and_counted_in_c(dtype: torch.dtype) -> None:
    """With torch's own numbers; `report` tells the same."""
    made = case(90, 90, dtype=dtype)
    out, seen = attend(made.query, made.keys, made.keys, made.ask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        made.query, made.keys, made.keys, is_causal=True, scale=made.ask.scale, enable_gqa=True
    )
    told = native_columns.columns(made.query, made.keys, made.ask)
    assert torch.equal(out, expected)
    assert seen.columns is not None
    assert torch.equal(seen.columns, told)
    again = report(made.query, made.keys, made.ask).columns
    assert again is not None
    assert torch.equal(again, told)


def test_torch_serves_where_the_library_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVHIVE_NATIVE", "0")
    native.loaded.cache_clear()
    try:
        made = case(40, 90)
        assert not native_columns.serves(made.query, made.keys, made.ask)
        columns = report(made.query, made.keys, made.ask).columns
        torch.testing.assert_close(columns, made.told(), rtol=1e-4, atol=1e-5)
    finally:
        monkeypatch.undo()
        native.loaded.cache_clear()
