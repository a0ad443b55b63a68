"""Triton's programs for ragged rows against the obvious kernel, in Triton's interpreter where there
is no GPU (see `tests/conftest.py`); and that they compile for GPUs, which takes none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Needs, ragged_reference, triton_ragged
from kvhive.kernels.triton_tiles import SPLIT, TALLEST
from tests.kernels.ragged_cases import Case, case, lengths, needs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TOLD = 1e-5  # of reports and log-sum-exps, which no dtype rounds
EDGES = (0, 1, SPLIT - 1, SPLIT, SPLIT + 1)
WIDTHS = ((64, 64), (80, 96), (96, 80), (128, 64), (256, 256))
SHARED = 99 << 10  # bytes of shared memory that a program may have on GPUs since 2020
ROOT = Path(__file__).parents[2]


pytest.importorskip("triton", reason="Triton cannot be imported: pip install triton")


def close(ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> bool:
    """Both absent, or of one shape, finite in the same places, and within the tolerance there,
    relative to the largest number.
    """
    if ours is None or theirs is None:
        return ours is theirs
    finite = theirs.isfinite()
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), finite):
        return False
    theirs, ours = theirs[finite].double(), ours[finite].double()
    largest = theirs.abs().max().clamp_min(1) if len(theirs) else 1
    return bool(((ours - theirs).abs() <= tolerance * largest).all())


def agrees(one: Case) -> None:
    """The output, the log-sum-exp and the report, with those of the obvious kernel."""
    wide = [tensor.double() for tensor in one.tensors]
    expected, whole = ragged_reference.attend(*wide, one.extents, one.scale)
    told = ragged_reference.report(*wide[:2], one.extents, whole, one.scale, one.needs)
    out, lse = triton_ragged.attend(*one.tensors, one.extents, one.scale)
    seen = triton_ragged.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)
    assert (out.dtype, lse.dtype) == (one.query.dtype, torch.float32)
    assert close(out, expected, TOLERANCE[out.dtype])
    assert close(lse, whole, TOLD)
    assert close(seen.columns, told.columns, TOLD)
    assert close(seen.rows, told.rows, TOLD)
    for report in (seen.columns, seen.rows):
        assert report is None or report.dtype == torch.float32


@given(
    rows=lengths(st.one_of(st.sampled_from(EDGES), st.integers(0, 2 * SPLIT))),
    group=st.sampled_from([1, 3, 4, 8]),
    widths=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(list(TOLERANCE)),
    q=st.sampled_from([1, 1, 2, 5, 16]),
    needs=needs(),
    index=st.sampled_from([torch.int32, torch.int64]),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_same_as_the_reference(
    rows: list[list[int]],
    group: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    q: int,
    needs: Needs,
    index: torch.dtype,
    padded: bool,
    seed: int,
) -> None:
    older = 0 if q == 1 else q  # of one query, rows may be empty
    grown = [[length + older for length in heads] for heads in rows]
    agrees(case(grown, group, widths, dtype, q, seed, needs, index, padded, DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_head_size_in_every_dtype(widths: tuple[int, int], dtype: torch.dtype) -> None:
    asked = Needs(columns="square", fold=False, last_rows=1)
    agrees(case([[70, 0, 3]], 3, widths, dtype, needs=asked, device=DEVICE))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_lengths_at_the_edges_of_splits_and_very_unequal(group: int) -> None:
    asked = Needs(columns="sum", last_rows=1)
    agrees(case([EDGES, (1500, 0, 2, 2 * SPLIT, 64)], group, needs=asked, device=DEVICE))


@pytest.mark.parametrize("fold", [True, False])
def test_groups_of_more_than_one_tile(fold: bool) -> None:
    asked = Needs(columns="sum", fold=fold, last_rows=1)
    agrees(case([[70, 3]], TALLEST + 3, needs=asked, device=DEVICE))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("q", [2, 3, 16])
def test_newest_queries_see_each_other_causally(q: int, group: int) -> None:
    """Also where a row holds nothing older, and where a split begins among them."""
    asked = Needs(columns="sum", decay=0.8, last_rows=2)
    agrees(case([[q, SPLIT + 1, 65]], group, q=q, needs=asked, device=DEVICE))


def test_queries_that_only_fill_a_tile_have_no_weight() -> None:
    """Five queries in a tile of eight: with no decay left, theirs would be infinite."""
    asked = Needs(columns="sum", decay=0.0)
    agrees(case([[9, 5]], q=5, needs=asked, device=DEVICE))


def test_all_rows_may_be_empty() -> None:
    one = case([[0, 0], [0, 0]], needs=Needs(columns="sum", last_rows=1), device=DEVICE)
    assert one.extents.longest == 0
    agrees(one)


def test_a_row_of_which_nothing_is_valid_gives_zeros() -> None:
    one = case([[5, SPLIT + 40]], padded=True, device=DEVICE)
    assert one.extents.valid is not None
    one.extents.valid.zero_()
    agrees(one)
    out, lse = triton_ragged.attend(*one.tensors, one.extents, one.scale)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool(lse.isneginf().all())


def test_more_splits_than_a_row_needs_change_nothing() -> None:
    one = case([[3, 300]], device=DEVICE)
    loose = replace(one.extents, longest=5 * SPLIT)
    for tight, wide in zip(
        triton_ragged.attend(*one.tensors, one.extents, one.scale),
        triton_ragged.attend(*one.tensors, loose, one.scale),
        strict=True,
    ):
        assert torch.equal(tight, wide)


def test_large_logits_stay_finite() -> None:
    """Products of 1e5 and more, which float16 cannot hold; one slot takes nearly all."""
    one = case([[90, 300]], dtype=torch.float16, device=DEVICE)
    one.query *= 200
    one.keys *= 200
    assert float((one.query[:, :4, 0].float() @ one.keys.float().T).nan_to_num().max()) > 1e5
    out, lse = triton_ragged.attend(*one.tensors, one.extents, one.scale)
    wide = [tensor.double() for tensor in one.tensors]
    expected, whole = ragged_reference.attend(*wide, one.extents, one.scale)
    assert close(out, expected, 1e-2)
    assert close(lse, whole, TOLD)


def test_programs_compile_for_gpus_and_fit_them(tmp_path: Path) -> None:
    """In a process of its own, in which Triton does not interpret."""
    script = Path(__file__).with_name("compile_triton.py")
    setting = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "ragged", "80"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=setting)
    assert run.returncode == 0, run.stderr
    for name, shared in json.loads(run.stdout).items():
        assert len(shared) == 3, name
        assert max(shared) <= SHARED, name
