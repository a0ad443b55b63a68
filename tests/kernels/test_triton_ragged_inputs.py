"""What the kernel for ragged rows refuses, and that it says so before it needs Triton."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from kvhive import kernels
from kvhive.kernels import Needs, triton_ragged, triton_tiles
from kvhive.kernels.ragged import Extents
from tests.kernels.ragged_cases import case


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is not installed, whatever an earlier test imported."""
    monkeypatch.setitem(sys.modules, "kvhive.kernels.triton_programs", None)
    monkeypatch.delattr(kernels, "triton_programs", raising=False)


def test_without_triton_one_sentence_says_so() -> None:
    one = case([[3, 5]])
    with pytest.raises(ImportError, match=r"Triton is missing; install the package triton"):
        triton_ragged.attend(*one.tensors, one.extents, one.scale)
    lse = torch.zeros(1, 8, 1)
    with pytest.raises(ImportError, match=r"Triton is missing; install the package triton"):
        triton_ragged.report(one.query, one.keys, one.extents, lse, 1.0, one.needs)


def test_available_says_whether_triton_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, "there"):
        monkeypatch.setattr(triton_tiles.importlib.util, "find_spec", lambda name, is_=found: is_)
        triton_tiles.available.cache_clear()
        assert triton_tiles.available() == (found is not None)
    triton_tiles.available.cache_clear()


def test_a_report_of_nothing_takes_nothing() -> None:
    one = case([[3, 5]])
    seen = triton_ragged.report(one.query, one.keys, one.extents, one.query, 1.0, Needs())
    assert (seen.columns, seen.rows) == (None, None)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (0, lambda query: query.half(), r"one dtype .* got torch.float16 and torch.float32"),
        (0, lambda query: query[..., :63], r"keys: expected \[S, 63\]"),
        (0, lambda query: query[:, :7], r"starts: expected one for each KV head of 1 x 7 .* got 2"),
        (0, lambda query: query.repeat(1, 1, 17, 1), r"expected 1 to 16 a row, got 17"),
        (1, lambda keys: keys.double(), r"one dtype .* got torch.float32 and torch.float64"),
        (1, lambda keys: keys.T.contiguous().T, r"keys: .* without gaps, .* strides \[1, "),
        (2, lambda values: values[1:], r"values: expected torch.float32 \[\d+, e\]"),
        (2, lambda values: values.half(), r"values: .* got torch.float16"),
        (2, lambda values: values.repeat(1, 5), r"heads of at most 256, got 320"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensor: int, change: object, message: str) -> None:
    one = case([[3, 5]])
    tensors = list(one.tensors)
    tensors[tensor] = change(tensors[tensor])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        triton_ragged.attend(*tensors, one.extents, one.scale)


def test_heads_that_are_too_wide_are_refused() -> None:
    one = case([[3, 5]], widths=(257, 64))
    with pytest.raises(ValueError, match=r"keys: expected heads of at most 256 numbers, got 257"):
        triton_ragged.attend(*one.tensors, one.extents, one.scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": torch.zeros(2)}, r"starts and lengths: expected int32 or int64, .*float32"),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths: expected 2, one a row, got \[3\]"),
        ({"valid": torch.ones(1, dtype=torch.bool)}, r"valid: expected torch.bool \[\d+\], got"),
        ({"valid": torch.ones(9)}, r"valid: expected torch.bool .* got torch.float32"),
    ],
)
def test_extents_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    one = case([[3, 5]])
    extents: Extents = replace(one.extents, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        triton_ragged.attend(*one.tensors, extents, one.scale)
