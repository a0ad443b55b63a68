"""StreamingLLM: sinks and window after every step, and room for a turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import NOTHING
from kvhive.policies.streaming_llm import StreamingLLM
from kvhive.recipe import Recipe

from ..conformance.playing import make_layer
from .oracles import SlowWindow
from .rig import Rig

CHUNKS = st.lists(st.sampled_from([1, 1, 2, 5, 17, 40]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(sink=st.integers(0, 6), recent=st.integers(1, 9), chunks=CHUNKS)
def test_the_first_and_the_last_stay(sink: int, recent: int, chunks: list[int]) -> None:
    """{0 .. sink - 1} and the last `recent`, min(seen, budget) in all, the same in every head."""
    rig, slow = Rig(StreamingLLM(sink=sink), sink + recent, heads=2), SlowWindow(sink, recent)
    for fresh in chunks:
        rig.step(fresh)
        slow.step(fresh)
        assert rig.positions == [slow.held, slow.held]
        first, last = (
            set(range(min(sink, rig.seen))),
            set(range(max(rig.seen - recent, 0), rig.seen)),
        )
        assert set(slow.held) == first | last


def test_an_empty_window_is_empty() -> None:
    """A budget of the sinks alone leaves the sinks, not everything."""
    rig = Rig(StreamingLLM(sink=4), 4)
    rig.step(10)
    assert rig.positions == [[0, 1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(prompt=st.integers(1, 60), turn=st.integers(0, 60))
def test_making_room_leaves_the_turn_its_place(prompt: int, turn: int) -> None:
    """If the turn would not fit: sinks, and the window less the turn; at last the sinks alone."""
    sink, recent = 4, 20
    layer, keys = make_layer(StreamingLLM(sink=sink), sink + recent), torch.ones(1, 1, prompt, 2)
    layer.update(keys, keys)
    layer.attend(keys, 1.0)
    before = layer.slots.position[0, 0].tolist()
    layer.make_room(turn)
    expected = before
    if len(before) + turn > sink + recent:
        window = max(recent - turn, 0)
        expected = before[:sink] + before[max(len(before) - window, sink) :]
    assert layer.slots.position.tolist() == [[expected]]


def test_it_needs_no_scores_and_a_sensible_sink() -> None:
    """Four sinks unless told otherwise, and room for one recent token at least."""
    assert StreamingLLM().needs == NOTHING
    assert StreamingLLM().sink == 4
    assert StreamingLLM().positions == "cache"
    with pytest.raises(ValueError, match="sink must be at least 0, got -2"):
        StreamingLLM(sink=-2)
    with pytest.raises(ValueError, match="a budget of 4 is below 5"):
        Recipe.parse("streaming_llm@4")
