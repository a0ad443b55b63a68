"""Triton's programs for rows in several forms against the obvious kernel over tokens that torch
unpacked, in Triton's interpreter where there is no GPU (see `tests/conftest.py`); and that they
compile for GPUs, which takes none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import Needs, triton_packed
from kvhive.kernels.bits import WIDTHS
from kvhive.kernels.triton_tiles import SPLIT, TALLEST
from tests.kernels.packed_segment_cases import EXACT, Case, Part, case
from tests.kernels.ragged_cases import needs
from tests.kernels.test_triton_ragged import DEVICE, ROOT, SHARED, TOLD, TOLERANCE, close

pytestmark = pytest.mark.skipif(not triton_packed.available(), reason="needs Triton 3.4 or later")

SIZES = {64: 32, 80: 40, 96: 32, 128: 64}  # head sizes, each with a group that divides it
EVERYTHING = Needs(columns="square", fold=False, decay=0.8, last_rows=2)


def agrees(one: Case) -> None:
    """The output, the log-sum-exp and the report, with those of the obvious kernel."""
    expected, whole, columns, rows = one.expected()
    out, lse = triton_packed.attend(one.query, one.segments, one.scale)
    seen = triton_packed.report(one.query, one.segments, lse, one.scale, one.needs, one.length)
    assert (out.dtype, lse.dtype) == (one.query.dtype, torch.float32)
    assert close(out.cpu(), expected, TOLERANCE[out.dtype])
    assert close(lse.cpu(), whole, TOLD)
    told = None if seen.rows is None else seen.rows.all().cpu()
    assert close(None if seen.columns is None else seen.columns.cpu(), columns, TOLD)
    assert close(told, rows, TOLD)
    assert (seen.fresh, seen.scale) == (one.query.shape[2], one.scale)


def part(width: int) -> st.SearchStrategy[Part]:
    """Exact, or of few bits with a grid per token or per channel."""
    few = st.sampled_from(WIDTHS)
    return st.one_of(
        st.just(EXACT), st.builds(Part, few), st.builds(Part, few, st.just(SIZES[width]))
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `case`: one to four parts of up to four rows, of which the newest is exact;
    values are cut elsewhere than keys.
    """
    widths = draw(st.sampled_from(list(SIZES))), draw(st.sampled_from(list(SIZES)))
    rows, batch = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    q = draw(st.sampled_from([1, 1, 3, 16]))
    some = st.lists(st.sampled_from([0, 1, 7, 40, 70]), min_size=rows, max_size=rows)
    parts = [(draw(part(widths[0])), draw(some)) for _ in range(draw(st.integers(0, 3)))]
    tail = [length + (q if q > 1 else 0) for length in draw(some)]
    shift = draw(st.integers(0, min(tail)))  # these values are packed, their keys are not
    values = [(draw(part(widths[1])), lengths) for _, lengths in parts]
    values.append((draw(part(widths[1])), [shift] * rows))
    values.append((EXACT, [length - shift for length in tail]))
    return dict(
        key_parts=[*parts, (EXACT, tail)],
        value_parts=values,
        group=draw(st.sampled_from([1, 3, 4])),
        widths=widths,
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        q=q,
        seed=draw(st.integers(0, 1000)),
        needs=draw(needs()),
        batch=batch,
        aligned=draw(st.booleans()),
    )


@given(drawn=cases())
@settings(max_examples=12)
def test_same_as_the_reference(drawn: dict[str, Any]) -> None:
    one = case(**drawn, device=DEVICE)
    if one.segments:
        agrees(one)


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_of_numbers_and_heads(bits: int, width: int) -> None:
    """Keys per channel and values per token, and the reverse."""
    channel, token = Part(bits), Part(bits, SIZES[width])
    keys = [(channel, [33]), (token, [20]), (EXACT, [3])]
    values = [(token, [33]), (channel, [20]), (EXACT, [3])]
    agrees(case(keys, values, widths=(width, width), needs=EVERYTHING, device=DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ahead", [0, 3])
def test_keys_and_values_change_their_form_at_different_tokens(
    dtype: torch.dtype, ahead: int
) -> None:
    """KIVI: values leave the window one by one, keys by runs, so that either may be ahead."""
    keys = [(EXACT, [4, 4, 2]), (Part(2), [64, 64, 0]), (EXACT, [5, 5, 0])]
    values = [(EXACT, [4, 4, 2]), (Part(4, 32), [61 + ahead, 66, 0]), (EXACT, [8 - ahead, 3, 0])]
    agrees(case(keys, values, dtype=dtype, needs=EVERYTHING, device=DEVICE))


def test_segments_longer_and_shorter_than_a_split() -> None:
    """Tiers: the best tokens in 4 bits, others in 3."""
    parts = [
        (EXACT, [4, 4, 0]),
        (Part(4, 32), [SPLIT + 1, 0, 2]),
        (Part(3, 32), [2 * SPLIT + 5, SPLIT, 0]),
        (EXACT, [17, 1, 0]),
    ]
    agrees(case(parts, group=3, needs=Needs(columns="sum", last_rows=1), device=DEVICE))


@pytest.mark.parametrize("aligned", [False, True])
def test_newest_queries_see_each_other_causally_in_any_segment(aligned: bool) -> None:
    """Five tokens of the step, of which the oldest are packed already."""
    parts = [(Part(4, 32), [3, 40]), (Part(3), [2, 30]), (EXACT, [2, 3])]
    agrees(case(parts, q=5, needs=EVERYTHING, aligned=aligned, device=DEVICE))


@pytest.mark.parametrize("fold", [True, False])
def test_groups_of_more_than_one_tile(fold: bool) -> None:
    asked = Needs(columns="sum", fold=fold, last_rows=1)
    agrees(case([(Part(4), [30, 3])], group=TALLEST + 3, needs=asked, device=DEVICE))


def test_rows_without_a_token_give_zeros() -> None:
    one = case([(Part(4, 32), [0, 20]), (EXACT, [0, 3])], device=DEVICE)
    agrees(one)
    out, lse = triton_packed.attend(one.query, one.segments, one.scale)
    assert not out[:, :4].any()
    assert bool(lse[:, :4].isneginf().all())
    none = [replace(part, lengths=torch.zeros_like(part.lengths)) for part in one.segments]
    out, lse = triton_packed.attend(one.query, none, one.scale)
    seen = triton_packed.report(one.query, none, lse, one.scale, one.needs, 5)
    assert not out.any()
    assert bool(lse.isneginf().all())
    assert seen.columns is not None
    assert torch.equal(seen.columns.cpu(), torch.zeros(1, 2, 5))


def test_places_behind_the_last_row_receive_nothing() -> None:
    one = case([(EXACT, [2, 3])], needs=Needs(columns="sum", last_rows=1), device=DEVICE)
    _, lse = triton_packed.attend(one.query, one.segments, one.scale)
    seen = triton_packed.report(one.query, one.segments, lse, one.scale, one.needs, 9)
    assert seen.columns is not None
    assert seen.rows is not None
    assert seen.columns.shape == (1, 2, 9)
    assert not seen.columns[..., 3:].any()
    assert not seen.rows.all()[..., 3:].any()


def test_programs_compile_for_gpus_and_fit_them(tmp_path: Path) -> None:
    """In a process of its own, in which Triton does not interpret."""
    script = Path(__file__).with_name("compile_triton.py")
    setting = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "packed", "80"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=setting)
    assert run.returncode == 0, run.stderr
    for name, shared in json.loads(run.stdout).items():
        assert len(shared) == 3, name
        assert max(shared) <= SHARED, name
