"""Triton's programs for column sums against the obvious kernel, in Triton's interpreter where there
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

from kvhive.kernels import Ask, Needs, dispatch, native_columns, reference, triton_columns
from kvhive.kernels.triton_tiles import SPLIT
from kvhive.step import Step
from tests.kernels.test_triton_ragged import DEVICE, ROOT, SHARED, TOLD, TOLERANCE, close

pytest.importorskip("triton", reason="Triton cannot be imported: pip install triton")

SUM = Needs(columns="sum")


def case(
    q: int,
    older: int,
    kv_heads: int = 2,
    group: int = 3,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries as a model's projection lays them, and keys with NaN in the room behind them."""
    source = torch.Generator().manual_seed(seed)
    n, heads = older + q, kv_heads * group
    query = torch.randn(batch, q, heads, width, generator=source)
    keys = torch.randn(batch, kv_heads, n + 3, width, generator=source)
    keys[:, :, n:] = float("nan")
    return query.to(DEVICE, dtype).transpose(1, 2), keys.to(DEVICE, dtype)[:, :, :n]


def agrees(query: Tensor, keys: Tensor, needs: Needs, causal: bool = True) -> None:
    """The columns, with those of the obvious kernel."""
    ask = Ask(Step.plain(0, query.shape[2]), query.shape[3] ** -0.5, needs, causal=causal)
    expected = reference.attend(query, keys, keys, ask)[1].columns
    ours = triton_columns.columns(query, keys, ask)
    assert ours.dtype == torch.float32
    assert close(ours, expected, TOLD)


@given(
    q=st.one_of(st.sampled_from([1, 16, 64, 65]), st.integers(2, 40)),
    older=st.sampled_from([0, 0, 1, 63, 64, 90]),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7)]),
    width=st.sampled_from([64, 80, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    batch=st.integers(1, 2),
    needs=st.builds(Needs, columns=st.sampled_from(["sum", "square"]), fold=st.booleans()),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_same_as_the_reference(
    q: int,
    older: int,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    batch: int,
    needs: Needs,
    causal: bool,
    seed: int,
) -> None:
    agrees(*case(q, older, *heads, width, dtype, batch, seed), needs, causal)


@pytest.mark.parametrize("q", [1, 5])
@pytest.mark.parametrize("older", [SPLIT, 2 * SPLIT - 3])
def test_few_queries_meet_many_slots_in_splits(q: int, older: int) -> None:
    """Also where no query but the newest sees the last split."""
    agrees(*case(q, older, dtype=torch.bfloat16), SUM)


def test_few_splits_are_of_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs keep a GPU busy already."""
    monkeypatch.setattr(triton_columns, "BUSY", 4)
    assert triton_columns._split(5 * SPLIT, programs=2) == 3 * SPLIT
    agrees(*case(2, 4 * SPLIT), replace(SUM, columns="square"))
    for n in (1, SPLIT, SPLIT + 1):
        assert triton_columns._split(n, programs=99) >= n


def test_large_logits_stay_finite_and_every_query_gives_one() -> None:
    """Products of 1e5 and more, which float16 cannot hold."""
    query, keys = (200 * tensor for tensor in case(9, 60, dtype=torch.float16))
    ask = Ask(Step.plain(0, 9), 64**-0.5, SUM)
    assert float((query[:, :2].float() @ keys.float().mT).abs().max()) > 1e5
    sums = triton_columns.columns(query, keys, ask).sum(-1)
    assert sums.flatten().tolist() == pytest.approx([27.0, 27.0], rel=1e-4)


def test_a_report_takes_them_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch where they do not, or not on such a device."""
    query, keys = case(5, 20)
    plain = Ask(Step.plain(0, 5), 0.1, replace(SUM, last_rows=2))
    decayed = replace(plain, needs=replace(SUM, decay=0.9))
    served: list[Ask] = []
    columns = triton_columns.columns

    def count(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
        served.append(ask)
        return columns(query, keys, ask)

    monkeypatch.setattr(triton_columns, "columns", count)
    monkeypatch.setattr(native_columns, "serves", lambda *inputs: False)  # on a GPU it never does
    for device, asked, expected in (
        ("nowhere", plain, []),
        (DEVICE, decayed, []),
        (DEVICE, replace(plain, needs=Needs(last_rows=2)), []),
        (DEVICE, plain, [plain]),
    ):
        monkeypatch.setattr(dispatch, "LAUNCHED", (device,))
        seen, told = dispatch.report(query, keys, asked), reference.attend(query, keys, keys, asked)
        assert close(seen.columns, told[1].columns, TOLD)
        assert (seen.rows is None) == (told[1].rows is None)
        assert served == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needs": Needs()}, r"needs: expected columns without decay, got None, decay 1"),
        ({"needs": Needs(columns="sum", decay=0.9)}, r"got sum, decay 0.9"),
        ({"valid": torch.ones(1, 2, 25, dtype=torch.bool)}, r"no empty slots; leave .* to torch"),
        (
            {"query": torch.zeros(1, 6, 5, 64).half()},
            r"one dtype .* torch.float16 and torch.float3",
        ),
        ({"query": torch.zeros(1, 6, 5, 32)}, r"keys: expected heads of 32 numbers, .* got 64"),
        ({"query": torch.zeros(1, 6, 64, 5).mT}, r"side by side, got strides \[.*, 1, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    """In one sentence, before Triton is needed."""
    query, keys = case(5, 20)
    given = {"query": query, "needs": SUM, "valid": None, **changes}
    query = given.pop("query")  # type: ignore[assignment]
    ask = Ask(Step.plain(0, 5), 0.1, **given)  # type: ignore[arg-type]
    assert not triton_columns.fits(query, keys, ask)
    with pytest.raises(ValueError, match=message):
        triton_columns.columns(query, keys, ask)


def test_without_triton_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvhive.kernels.triton_columns_programs", None)
    monkeypatch.delattr("kvhive.kernels.triton_columns_programs", raising=False)
    with pytest.raises(ImportError, match=r"Triton is missing; install the package triton"):
        triton_columns.columns(*case(5, 20), Ask(Step.plain(0, 5), 0.1, SUM))


def test_programs_compile_for_gpus_and_fit_them(tmp_path: Path) -> None:
    """In a process of its own, in which Triton does not interpret."""
    script = Path(__file__).with_name("compile_triton.py")
    setting = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "columns", "80"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=setting)
    assert run.returncode == 0, run.stderr
    for name, shared in json.loads(run.stdout).items():
        assert len(shared) == 2, name
        assert max(shared) <= SHARED, name
