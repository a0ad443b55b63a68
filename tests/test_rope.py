"""Rotary positions: exact turns, in any layout, however far; and streams that never drift."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.cache.positions import MOST
from kvhive.rope import FINE, Rotation
from tests.support import make_layer

WIDTH = 8
FREQUENCIES = 10_000.0 ** -(torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
LAYOUTS = ("halves", "pairs")


def turned(keys: Tensor, position: Tensor, layout: str, frequencies: Tensor) -> Tensor:
    """Each pair of channels as a complex number, times e^(i angle), in float64: the definition."""
    half = len(frequencies)
    wide = keys.double().clone()
    first = slice(0, half) if layout == "halves" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if layout == "halves" else slice(1, 2 * half, 2)
    angle = position.double()[..., None] * frequencies
    number = torch.complex(wide[..., first], wide[..., second]) * torch.polar(angle * 0 + 1, angle)
    wide[..., first], wide[..., second] = number.real, number.imag
    return wide


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary", [2, 4, 8])
@given(most=st.sampled_from([1, 37, FINE - 1, FINE, FINE + 1, 300_000, 2_000_000]))
@settings(max_examples=10, deadline=None)
def test_a_turn_is_exact(layout: str, rotary: int, most: int) -> None:
    """Partial rotation too: channels beyond the rotary ones stay as they are."""
    frequencies = FREQUENCIES[: rotary // 2]
    source = torch.Generator().manual_seed(most)
    keys = torch.randn(2, 3, 50, WIDTH, generator=source)
    shift = torch.randint(0, most + 1, (2, 3, 50), generator=source)
    shift[0, 0, 0] = most
    result = Rotation(frequencies, layout).rotate(keys, shift, most)  # type: ignore[arg-type]
    assert result.dtype == keys.dtype
    assert torch.allclose(result.double(), turned(keys, shift, layout, frequencies), atol=3e-6)
    assert torch.equal(result[..., rotary:], keys[..., rotary:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turns_add_up(layout: str) -> None:
    rotation = Rotation(FREQUENCIES, layout)  # type: ignore[arg-type]
    keys = torch.randn(1, 1, 20, WIDTH)
    one, two = torch.full((1, 1, 20), 900), torch.full((1, 1, 20), 30_000)
    twice = rotation.rotate(rotation.rotate(keys, one, 900), two, 30_000)
    assert torch.allclose(twice, rotation.rotate(keys, one + two, 40_000), atol=1e-5)
    assert torch.equal(rotation.rotate(keys, one * 0, 0), keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    keys = torch.randn(1, 2, 100, WIDTH).to(dtype)
    shift = torch.arange(200).view(1, 2, 100) * 91
    result = Rotation(FREQUENCIES).rotate(keys, shift, 20_000)
    exact = turned(keys, shift, "halves", FREQUENCIES)
    assert result.dtype == dtype
    assert torch.equal(result, exact.to(dtype)) or torch.allclose(
        result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6
    )


class Stream:
    """A long stream of turned keys into one layer, each position written by its exact angle."""

    def __init__(self, recipe: str, dtype: torch.dtype, layout: str = "halves") -> None:
        self.rotation = Rotation(FREQUENCIES, layout)  # type: ignore[arg-type]
        self.layer: HiveLayer = make_layer(recipe, self.rotation)
        self.layout, self.seen = layout, 0
        self.plain = torch.randn(1, 2, 21_000, WIDTH)
        written = turned(self.plain, torch.arange(21_000), layout, FREQUENCIES)
        self.keys, self.queries = written.to(dtype), torch.randn(1, 2, 21_000, WIDTH).to(dtype)

    def step(self, tokens: int) -> None:
        """Feed the next tokens of the stream."""
        fresh = slice(self.seen, self.seen + tokens)
        self.seen += tokens
        self.layer.update(self.keys[:, :, fresh], self.keys[:, :, fresh])
        self.layer.attend(self.queries[:, :, fresh], 0.3)

    def worst(self) -> float:
        """The largest relative error of any key read, against the plain key turned to its place.

        A key of rank r among m belongs at the newest position less the m - 1 - r tokens behind it.
        """
        slots = self.layer.slots
        position = slots.position.long()
        index = position[..., None].expand(*position.shape, WIDTH)
        place = self.seen - slots.length + torch.arange(slots.length)
        exact = turned(self.plain.gather(2, index), place, self.layout, FREQUENCIES)
        read = self.layer.store.view()[0].double()
        return float(((read - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize(("recipe", "size"), [("streaming_llm(slack=8)@20", 1), ("buzz@40", 5)])
def test_nothing_drifts_in_twenty_thousand_tokens(recipe: str, size: int) -> None:
    stream = Stream(recipe, torch.bfloat16)
    stream.step(50)
    worst = 0.0
    for i in range(0, 20_000, size):
        stream.step(size)
        if i % 2_500 == 0:
            worst = max(worst, stream.worst())
    assert stream.layer.slots.position[0, 0, 0] == 0
    assert worst < 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["streaming_llm@20", "window@20", "buzz@40", "h2o@20"])
def test_keys_are_read_at_their_place_in_the_cache(recipe: str, layout: str) -> None:
    """After every kind of step, with prompts and turns whose evictions leave gaps anywhere."""
    stream = Stream(recipe, torch.float32, layout)
    for tokens in (60, 1, 1, 15, *[1] * 50, 3, 90, 1):
        stream.step(tokens)
        assert stream.worst() < 1e-5


@pytest.mark.parametrize(("recipe", "most"), [("streaming_llm@80", 4), ("buzz@80", 8)])
def test_what_lives_long_is_held_as_it_was_and_counted(recipe: str, most: int) -> None:
    """Sinks see every eviction; almost all others are turned a few times only."""
    stream = Stream(recipe, torch.float32)
    stream.step(100)
    layer, (batch, heads) = stream.layer, stream.keys.shape[:2]
    assert layer.turning.nbytes == 0, "nothing was turned often yet"
    for _ in range(1_500):
        stream.step(1)
    longlived = int((layer.slots["turned"] == MOST).sum())
    assert batch * heads * 4 <= longlived <= batch * heads * most
    assert layer.turning.nbytes == longlived * (WIDTH * 4 + 8)
    assert layer.nbytes == layer.turning.nbytes + layer.store.nbytes + layer.slots.nbytes
    assert stream.worst() < 1e-5


def test_the_newest_token_may_go() -> None:
    """TOVA drops it now and then: the others are turned by the gap it leaves."""
    stream, dropped = Stream("tova(positions=cache, slack=4)@20", torch.float32), 0
    for tokens in (60, *[1] * 200):
        stream.step(tokens)
        dropped += int(stream.layer.slots.position.max()) < stream.seen - 1
        assert stream.worst() < 1e-5
    assert dropped


def test_streaming_does_not_depend_on_where_it_is() -> None:
    """StreamingLLM's point: equal recent tokens give equal output, however much came before."""
    outputs = []
    for before in (30, 7_000):
        source = torch.Generator().manual_seed(0)
        layer = make_layer("streaming_llm(slack=0)@12", Rotation(FREQUENCIES))
        sinks, recent, filler = (
            torch.randn(1, 2, n, WIDTH, generator=source) for n in (4, 12, 7_000)
        )
        plain = torch.cat([sinks, filler[:, :, :before], recent], 2)
        position = torch.arange(plain.shape[2])
        keys = turned(plain, position, "halves", FREQUENCIES).float()
        for piece in (slice(0, before), *(slice(i, i + 1) for i in range(before, before + 16))):
            layer.update(keys[:, :, piece], plain[:, :, piece])
            out = layer.attend(keys[:, :, piece], 0.3)
        outputs.append(out)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_the_place_is_what_counts() -> None:
    """One key turned by hand: slot 0 of 3 left, 5 tokens gone, so it is read 5 positions later."""
    layer = make_layer("streaming_llm(sink=1)@3", Rotation(torch.tensor([0.5, 0.1])))
    keys = torch.zeros(1, 1, 8, 4)
    keys[..., 0] = 1.0  # all point the same way: position 0, however far along
    layer.update(keys, keys)
    layer.attend(torch.randn(1, 1, 8, 4), 1.0)
    assert layer.slots.position[0, 0].tolist() == [0, 6, 7]
    expected = torch.tensor([math.cos(2.5), 0.0, math.sin(2.5), 0.0])
    assert torch.allclose(layer.store.keys[0, 0, 0], expected, atol=1e-6)
    assert torch.equal(layer.store.values[0, 0, 0], keys[0, 0, 0])
