"""What the kernel for rows in several forms refuses, that it says so before it needs Triton, and
which steps are its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvhive import kernels
from kvhive.kernels import Ask, Needs, dispatch, triton_packed, triton_tiles
from kvhive.kernels.packed_rows import PackedRows
from kvhive.kernels.packed_segments import ExactRows, Segment
from kvhive.step import Step
from tests.kernels.packed_segment_cases import EXACT, Case, Part, case


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is not installed, whatever an earlier test imported."""
    monkeypatch.setitem(sys.modules, "kvhive.kernels.triton_packed_programs", None)
    monkeypatch.delattr(kernels, "triton_packed_programs", raising=False)


@pytest.fixture
def one() -> Case:
    """Two rows, packed and exact."""
    return case([(Part(4, 32), [9, 5]), (EXACT, [3, 2])])


@pytest.mark.usefixtures("without_triton")
def test_without_triton_one_sentence_says_so(one: Case) -> None:
    with pytest.raises(ImportError, match=r"Triton is missing; install the package triton"):
        triton_packed.attend(one.query, one.segments, one.scale)
    lse = torch.zeros(1, 8, 1)
    with pytest.raises(ImportError, match=r"Triton is missing; install the package triton"):
        triton_packed.report(one.query, one.segments, lse, 1.0, one.needs, 12)


@pytest.mark.usefixtures("without_triton")
def test_a_report_of_nothing_takes_nothing(one: Case) -> None:
    seen = triton_packed.report(one.query, one.segments, one.query, 1.0, Needs(queries=True), 12)
    assert (seen.columns, seen.rows, seen.fresh) == (None, None, 1)
    assert seen.queries is one.query


@pytest.mark.parametrize(
    ("version", "serves"), [("3.3.1", False), ("3.4.0", True), ("3.10.0", True), ("4.0", True)]
)
def test_old_versions_do_not_serve(
    version: str, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tiles, "available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    triton_packed.available.cache_clear()
    assert triton_packed.available() == serves
    monkeypatch.setattr(triton_tiles, "available", lambda: False)
    triton_packed.available.cache_clear()
    assert not triton_packed.available()
    triton_packed.available.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda query: query.double(), r"queries: expected float16, .* got torch.float64"),
        (
            lambda query: query.half(),
            r"keys: expected torch.float16 without gaps, got torch.float32",
        ),
        (lambda query: query[..., :56], r"keys: expected 56 numbers a token, .* got 64"),
        (lambda query: query[:, :7], r"expected one for each KV head of 1 x 7 .* got 2"),
        (lambda query: query.repeat(1, 1, 17, 1), r"queries: expected 1 to 16 a row, got 17"),
    ],
)
@pytest.mark.usefixtures("without_triton")
def test_queries_that_do_not_fit_are_refused(
    one: Case, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        triton_packed.attend(change(one.query), one.segments, one.scale)


def refused(one: Case, segments: list[Segment], message: str) -> None:
    """By both."""
    with pytest.raises(ValueError, match=message):
        triton_packed.attend(one.query, segments, one.scale)
    with pytest.raises(ValueError, match=message):
        triton_packed.report(one.query, segments, one.query, one.scale, one.needs, 12)


@pytest.mark.usefixtures("without_triton")
def test_segments_that_do_not_fit_are_refused(one: Case) -> None:
    packed, exact = one.segments
    refused(one, [], r"segments: expected at least one, got none")
    short = replace(exact, lengths=exact.lengths[:1])
    refused(one, [packed, short], r"segments: expected 2 rows in each, got 1")
    assert isinstance(exact.values, ExactRows)
    numbers = exact.values.numbers
    for wrong, message in (
        (numbers.repeat(1, 2), r"values: expected 64 numbers a token, .* got 128"),
        (numbers.T.contiguous().T, r"values: expected torch.float32 without gaps, .*strides \[1, "),
        (numbers.half(), r"values: expected torch.float32 without gaps, got torch.float16"),
    ):
        rows = ExactRows(wrong, exact.values.starts, exact.values.lengths)
        refused(one, [packed, replace(exact, values=rows)], message)
    assert isinstance(packed.keys, PackedRows)
    codes = replace(packed.keys, codes=packed.keys.codes.int())
    message = r"keys: expected torch.uint8 without gaps, got torch.int32"
    refused(one, [replace(packed, keys=codes), exact], message)


def test_heads_that_are_too_wide_are_refused() -> None:
    one = case([(EXACT, [3, 5])], widths=(64, 264))
    refused(one, one.segments, r"values: expected 264 numbers a token, .* at most 256, got 264")


def test_a_launch_serves_few_queries_without_padding_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serves(q: int = 1, dtype: torch.dtype = torch.float32, **unlike: Tensor) -> bool:
        query, held = torch.zeros(1, 4, q, 64, dtype=dtype), torch.zeros(1, 2, 5, 64, dtype=dtype)
        ask = Ask(Step.plain(9, q), 1.0, valid=unlike.get("valid"))
        return dispatch.serves_packed(query, held, unlike.get("values", held), ask)

    monkeypatch.setattr(triton_packed, "available", lambda: True)
    assert not serves()
    monkeypatch.setattr(dispatch, "LAUNCHED", ("cpu",))
    assert serves()
    assert serves(16, torch.bfloat16)
    assert not serves(17)
    assert not serves(1, torch.float64)
    assert not serves(values=torch.zeros(1, 2, 5, 264))
    assert not serves(valid=torch.ones(1, 2, 5, dtype=torch.bool))
    monkeypatch.setattr(triton_packed, "available", lambda: False)
    assert not serves()


@pytest.mark.skipif(not triton_packed.available(), reason="needs Triton 3.4 or later")
def test_what_is_dispatched_attends_and_reports(one: Case) -> None:
    ask = Ask(Step.plain(9, 1), one.scale, one.needs)
    out, seen = dispatch.attend_packed(one.query, one.segments, ask, one.length)
    again = dispatch.report_packed(one.query, one.segments, ask, one.length)
    expected, _, columns, _ = one.expected()
    assert torch.allclose(out.double(), expected, atol=1e-5)
    for each in (seen, again):
        assert each.columns is not None
        assert columns is not None
        assert torch.allclose(each.columns, columns, atol=1e-5)
