"""Rotated: what is packed when, at what cost, and that nothing is ever rounded twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.kernels import Ask
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores._packed import PackedKind
from kvhive.stores.base import LayerFacts, Store
from kvhive.stores.dense import DenseStore
from kvhive.stores.kivi import Kivi
from kvhive.stores.rotated import Rotated
from kvhive.stores.tiers import Tiers

WIDTH = 64


def tokens(count: int, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of 2 rows and 2 heads."""
    source = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, count, width, generator=source) for _ in range(2))
    return keys, values


@pytest.mark.parametrize(
    "kind",
    [
        Rotated(bits=4, residual=8, sink=2),
        Kivi(bits=4, group=8, residual=8, sink=2),
        Tiers(bits=4, rest_bits=3, group=8, residual=8, sink=2),
    ],
    ids=str,
)
def test_fifty_evictions_cost_no_accuracy(kind: PackedKind) -> None:
    """Every token is after them what it was when it was packed, up to the last bit of a sum."""
    length = 64
    store: Store = kind.new(LayerFacts(), [])
    store.append(*tokens(length), length)
    store.pack()
    made = [view.clone() for view in store.view()]  # of each token that is still held
    written = [tape.clone() for tape in tokens(length)]
    for round_ in range(50):
        source = torch.Generator().manual_seed(round_)
        drawn = torch.rand(2, 2, length, generator=source)
        keep = drawn.argsort(-1).argsort(-1) >= 6  # six go, of each head others
        best = keep & (drawn < 0.5)
        store = store.compact(Plan.keeping(keep, best=best), length)
        made, written = (
            [one[keep].view(2, 2, length - 6, WIDTH) for one in held] for held in (made, written)
        )
        new = tokens(6, seed=100 + round_)
        store.append(*new, length)
        store.pack()
        for place, view in enumerate(store.view()):
            written[place] = torch.cat([written[place], new[place]], 2)
            made[place] = torch.cat([made[place], new[place]], 2)
            exact = (made[place] == written[place]).all(-1)
            now_packed = exact & (view != made[place]).any(-1)
            made[place][now_packed] = view[now_packed]
            assert torch.allclose(view, made[place], atol=1e-5, rtol=0)
    assert bool((store.view()[0] != written[0]).any(-1).float().mean() > 0.5)


@pytest.mark.parametrize(("residual", "sink"), [(32, 4), (0, 0), (40, 2)])
def test_tokens_are_packed_in_groups_beyond_the_residual(residual: int, sink: int) -> None:
    """One by one; the sinks, and at least `residual` of the newest, are exact."""
    store: Store = Rotated(residual=residual, sink=sink).new(LayerFacts(), [])
    keys, values = tokens(140)
    for count in range(1, 141):
        cut = slice(count - 1, count)
        store.append(keys[:, :, cut], values[:, :, cut], count)
        store.pack()
        wrong = (store.view()[0] != keys[:, :, :count]).any(-1)
        packed = max(0, count - sink - residual) // 32 * 32
        assert bool(wrong[..., sink : sink + packed].all())
        assert int(wrong.sum()) == 4 * packed


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_bytes_are_what_the_bits_say(bits: int, width: int) -> None:
    """Codes and two 16-bit numbers for each group of 32, or of what divides the head."""
    store: Store = Rotated(bits=bits, residual=0, sink=0).new(LayerFacts(), [])
    keys, values = (tape.bfloat16() for tape in tokens(320, width))
    store.append(keys, values, 320)
    store.pack()
    group = {80: 16}.get(width, 32)
    codes = 2 * 4 * 320 * width * bits // 8
    grids = 2 * 4 * 320 * (width // group) * 2 * 2
    assert codes + grids <= store.nbytes <= codes + grids + 1000


def test_rounding_once_is_all_that_is_lost() -> None:
    """8 bits lose a thousandth of a token's length, and each bit less doubles that."""
    keys, values = tokens(300)
    keys[..., 3] *= 30  # a channel that would be all there is of a grid
    lost = []
    for bits in (8, 4, 3, 2):
        store: Store = Rotated(bits=bits, residual=0, sink=0).new(LayerFacts(), [])
        store.append(keys, values, 300)
        store.pack()
        lost.append(
            [
                float((a - b).norm() / b.norm())
                for a, b in zip(store.view(), (keys, values), strict=True)
            ]
        )
    steps = torch.tensor([[255.0, 15.0, 7.0, 3.0]]).T * torch.tensor(lost)
    assert bool((steps > 0.6).all())
    assert bool((steps < 1.6).all())


def test_what_fits_sinks_and_residual_is_attended_to_as_densely() -> None:
    """Bit by bit, in prefill and decoding."""
    keys, values = tokens(36)
    store, dense = Rotated(bits=2).new(LayerFacts(), []), DenseStore()
    start = 0
    for size in (20, 14, 1, 1):
        cut = slice(start, start + size)
        query = torch.randn(2, 4, size, WIDTH)
        ask = Ask(Step.plain(start, size), 0.125)
        for one in (store, dense):
            one.append(keys[:, :, cut], values[:, :, cut], start + size)
        assert torch.equal(store.attend(query, ask)[0], dense.attend(query, ask)[0])
        store.pack()
        start += size


def test_a_fold_is_the_mean_of_what_is_held() -> None:
    """In the packed middle as in the exact ends; what nobody joins stays as it is."""
    store: Store = Rotated(bits=8, residual=8, sink=2).new(LayerFacts(), [])
    store.append(*tokens(70), 70)
    store.pack()
    before = store.view()
    into = torch.full((2, 2, 70), -1)
    into[..., 10], into[..., 11] = 20, 20
    into[..., 68] = 69
    keep = into < 0
    store = store.compact(Plan.keeping(keep, into=into), 70)
    for now, then in zip(store.view(), before, strict=True):
        wanted = then.clone()
        wanted[:, :, 20] = then[:, :, [10, 11, 20]].mean(2)
        wanted[:, :, 69] = then[:, :, [68, 69]].mean(2)
        torch.testing.assert_close(now, wanted[keep].view_as(now), atol=0.02, rtol=0)
        same = keep.clone()
        same[..., 20] = False
        assert torch.allclose(now[same[keep].view(2, 2, -1)], wanted[same], atol=1e-5)


def test_everything_can_be_taken_back() -> None:
    """Into the packed part, into the sinks, and to nothing; then it begins anew."""
    store: Store = Rotated(bits=4, residual=8, sink=4).new(LayerFacts(), [])
    keys, values = tokens(90)
    store.append(keys, values, 90)
    store.pack()
    before = store.view()
    for length in (85, 80, 41, 5, 3, 1):
        store.truncate(length)
        for now, then in zip(store.view(), before, strict=True):
            assert torch.allclose(now, then[:, :, :length], atol=1e-5)
    store.append(keys[:, :, 1:60], values[:, :, 1:60], 60)
    store.pack()
    assert store.length == 60
    store.truncate(0)
    store.append(keys, values, 90)
    store.pack()
    assert torch.allclose(store.view()[0], before[0], atol=1e-5)
