"""Local window: the last tokens and nothing else; and the full cache, which keeps all."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import NOTHING
from kvhive.policies.full import Full
from kvhive.policies.streaming_llm import StreamingLLM
from kvhive.policies.window import Window

from .oracles import SlowWindow
from .rig import Rig

CHUNKS = st.lists(st.sampled_from([1, 1, 2, 5, 17]), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(budget=st.integers(1, 12), chunks=CHUNKS)
def test_the_last_stay(budget: int, chunks: list[int]) -> None:
    """The last `budget` tokens: what StreamingLLM keeps without sinks."""
    rig, slow = Rig(Window(), budget, heads=2), SlowWindow(0, budget)
    sinkless = Rig(StreamingLLM(sink=0), budget, heads=2)
    for fresh in chunks:
        rig.step(fresh)
        sinkless.step(fresh)
        slow.step(fresh)
        assert rig.positions == [slow.held, slow.held]
        assert sinkless.positions == rig.positions
        assert slow.held == list(range(max(rig.seen - budget, 0), rig.seen))


def test_full_keeps_all() -> None:
    """Even when asked to choose."""
    rig = Rig(Full(), 3)
    for fresh in (2, 5, 1):
        rig.step(fresh)
    assert rig.positions == [list(range(8))]


def test_neither_needs_scores() -> None:
    """Any attention kernel will do."""
    assert Window().needs == NOTHING
    assert Full().needs == NOTHING
