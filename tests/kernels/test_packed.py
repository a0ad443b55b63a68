"""Numbers of few bits, and attention's products with rows of them: each kernel against the obvious
formula in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import native, native_build, packed, packed_reference
from kvhive.kernels.bits import WIDTHS, grid, rounded, unpacked
from kvhive.kernels.bits import packed as pack
from tests.kernels.packed_cases import GRIDS, Case, case, cases

compiled = pytest.mark.skipif(native.loaded() is None, reason="the C kernels are not compiled here")
LANES = [4, 8, 16]  # floats in a vector, of each set of instructions


def close(got: Tensor, wanted: Tensor) -> None:
    """Up to what float32 loses in long sums."""
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * (1 + size))


def check(kernel: ModuleType, made: Case) -> None:
    """Both products; nothing else of the output is touched, strided as it may be."""
    count, heads, width = made.query.shape
    out = torch.randn(heads, count, made.weights.shape[2] + 3).transpose(0, 1)[:, :, 3:]
    wanted = made.logits(out)
    kernel.logits(made.query, made.rows, out, made.at)
    close(out, wanted)
    out = torch.randn(heads, count, width).transpose(0, 1)
    wanted = made.mix(out)
    kernel.mix(made.weights, made.rows, out, made.at)
    close(out, wanted)


@given(st.sampled_from(WIDTHS), st.integers(1, 40), st.integers(0, 4), st.integers(0, 2**16))
def test_packing_loses_nothing(bits: int, eighths: int, tokens: int, seed: int) -> None:
    """Each number stands where the docstring of `packed` says."""
    width = 8 * eighths
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (tokens, width), dtype=torch.uint8, generator=source)
    data = pack(codes, bits)
    assert data.shape == (tokens, width * bits // 8)
    assert torch.equal(unpacked(data, bits, width), codes)
    first, found = 0, torch.zeros_like(codes)
    for plane, shift in {2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 8: [(8, 0)]}[bits]:
        size = width * plane // 8
        for number in range(width):
            byte = data[:, first + number % size] >> (number // size * plane)
            found[:, number] |= (byte & (2**plane - 1)) << shift
        first += size
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_is_within_half_a_step(bits: int) -> None:
    """The extremes of a group are met, half a step is the most that is lost, and a group of one
    single value is that value.
    """
    numbers = torch.randn(50, 32)
    numbers[3] = 1.5
    least, largest = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    scale, zero = grid(least, largest, bits, torch.float32).unbind(-2)
    codes = rounded(numbers, scale, zero, bits)
    back = codes * scale + zero
    assert ((back - numbers).abs() <= scale / 2 + 1e-6).all()
    torch.testing.assert_close(back.amax(-1, keepdim=True), largest)
    assert torch.equal(back.amin(-1, keepdim=True), least)
    assert torch.equal(back[3], numbers[3])


@given(cases())
def test_the_torch_products_are_right(made: Case) -> None:
    check(packed_reference, made)


def test_the_torch_products_are_right_over_several_blocks() -> None:
    check(packed_reference, case([2 * packed_reference.BLOCK + 17, 3]))
    check(packed_reference, case([2 * packed_reference.BLOCK + 17, 3], group=None))


@compiled
@pytest.mark.parametrize("lanes", LANES)
@given(made=cases())
def test_the_native_products_are_right(lanes: int, made: Case) -> None:
    """With every set of instructions that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        best = native.lanes()
        patch.setattr(native, "lanes", lambda: min(lanes, best))
        check(native, made)


@compiled
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_native_products_share_long_rows_between_threads(
    threads: int, group: int | None
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(native, case([3000, 0, 1, 1777], group=group))
    finally:
        torch.set_num_threads(before)


@compiled
@given(made=cases())
def test_rows_beyond_their_arrays_are_refused(made: Case) -> None:
    """Before anything is written."""
    out = torch.zeros(made.weights.shape)
    if len(made.at) == 0:
        return
    made.rows.lengths[0] = len(made.rows.codes) + 1
    with pytest.raises(ValueError, match=r"packed rows: .* must lie inside"):
        native.logits(made.query, made.rows, out, made.at)
    assert not out.any()


def test_who_serves() -> None:
    """C takes what lies as it needs it, and torch the rest; the outcome is the same."""
    made = case([70, 9])
    rows, there = made.rows, native.loaded() is not None
    assert native.serves(rows, made.query, made.weights) == there
    spread = made.weights.repeat_interleave(2, -1)[..., ::2]
    assert not native.serves(rows, made.query, spread)
    assert not native.serves(rows, made.query.double(), made.weights)
    assert not native.serves(rows, made.query.requires_grad_(), made.weights)
    made.query.requires_grad_(False)
    check(packed, made)
    made.weights = spread
    check(packed, made)


def test_the_library_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVHIVE_NATIVE", "0")
    native.loaded.cache_clear()
    try:
        assert native.loaded() is None
        made = case([70, 9])
        assert not native.serves(made.rows, made.query, made.weights)
        check(packed, made)
    finally:
        monkeypatch.undo()
        native.loaded.cache_clear()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources, where the library is looked for."""
    for name in native_build.SOURCES:
        (tmp_path / name).write_bytes((native_build.HERE / name).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(native_build, "HERE", tmp_path)
        native.loaded.cache_clear()
        yield tmp_path
    native.loaded.cache_clear()


def test_without_a_compiler_there_is_no_library(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "COMPILERS", ("", "no-such-compiler", "false"))
    assert native_build.compiled(elsewhere) is None
    assert {path.name for path in elsewhere.iterdir()} == set(native_build.SOURCES)
    assert native.loaded() is None


@compiled
def test_a_library_of_other_sources_is_left_alone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install whose sources went on would call it with what it does not know."""
    monkeypatch.setattr(native_build, "FLAGS", ("-O0", "-fPIC", "-shared"))
    native_build.compiled(elsewhere)
    assert native.loaded() is not None
    native.loaded.cache_clear()
    with (elsewhere / native_build.SOURCES[0]).open("a") as source:
        source.write("/* changed */")
    assert native.loaded() is None


@st.composite
def numbers_to_code(draw: st.DrawFn) -> tuple[Tensor, int, int, torch.dtype, Tensor | None]:
    """What `coded` takes: finite numbers of any size, ties and constant groups among them."""
    width = 8 * draw(st.sampled_from((1, 3, 8, 10, 12, 16, 32, 33)))
    sizes = draw(st.lists(st.integers(1, 40), max_size=5))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    numbers = torch.randn(sum(sizes), width, generator=source)
    coarse = draw(st.sampled_from((None, 1, 4)))
    numbers = numbers if coarse is None else (numbers * coarse).round() / coarse
    numbers *= draw(st.sampled_from((1.0, 1e-6, 1e-9, 3e4, 1e6)))
    groups = [size for size in (1, 4, 8, 16, 20, 32, 40, 64, width) if width % size == 0]
    group = draw(st.one_of(st.none(), st.sampled_from(groups)))
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0) if group is None else None
    kept = draw(st.sampled_from(GRIDS))
    held = draw(st.sampled_from((torch.float32, kept)))
    most = torch.finfo(held).max
    numbers = numbers.clamp(-most, most).to(held)
    return numbers, draw(st.sampled_from(WIDTHS)), group or 1, kept, ends


@compiled
@pytest.mark.parametrize("lanes", LANES)
@given(made=numbers_to_code())
def test_the_native_codes_are_those_of_torch(
    lanes: int, made: tuple[Tensor, int, int, torch.dtype, Tensor | None]
) -> None:
    """To the last bit, grids included."""
    assert native.codes(made[0], made[3])
    with pytest.MonkeyPatch.context() as patch:
        best = native.lanes()
        patch.setattr(native, "lanes", lambda: min(lanes, best))
        codes, grids = native.coded(*made)
    wanted, theirs = packed_reference.coded(*made)
    assert torch.equal(codes, wanted)
    assert grids.dtype == theirs.dtype
    assert torch.equal(grids, theirs)


@compiled
@pytest.mark.parametrize("dtype", GRIDS)
def test_native_grids_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """All magnitudes, subnormal and overflowing ones among them; halves to even."""
    source = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.arange(-40, 40).repeat(50)
    sizes = torch.randn(4000, generator=source) * powers
    halves = (torch.randint(0, 2**12, (4000,), generator=source) + 0.5) * 2.0**-10
    zeros = torch.cat([sizes, halves, halves * 2.0**-24])
    _, grids = native.coded(zeros[:, None].expand(-1, 8), 8, 8, dtype)
    assert torch.equal(grids[:, 1, 0], zeros.to(dtype))


@compiled
@pytest.mark.parametrize("ends", [[], [3], [3, 3, 5], [0, 5], [6]])
def test_runs_that_do_not_fill_the_tokens_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"coded: .* runs all 5 tokens"):
        native.coded(torch.randn(5, 8), 4, 1, torch.float16, torch.tensor(ends).long())
    with pytest.raises(ValueError, match=r"coded: groups of 5 must fill tokens of 8 numbers"):
        native.coded(torch.randn(5, 8), 4, 5, torch.float16)
