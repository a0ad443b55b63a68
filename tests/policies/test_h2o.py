"""H2O against an oracle, and the laws of accumulated attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import TOGETHER, Needs
from kvhive.policies.h2o import H2O

from ..conformance.playing import Player, make_layer
from .oracles import SlowH2O, SlowWindow
from .rig import Rig, small_numbers

SEEDS = st.integers(0, 10**6)
CHUNKS = st.lists(st.sampled_from([1, 1, 1, 2, 5, 17, 40]), min_size=5, max_size=20)


def random_logits(seed: int, heads: int, tokens: int) -> torch.Tensor:
    """float32 `[heads, tokens, tokens]`, sharp enough for a few tokens to stand out."""
    return 3 * torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(heavy=st.integers(0, 12), recent=st.integers(0, 9), chunks=CHUNKS, seed=SEEDS)
def test_decisions_are_the_oracles(heavy: int, recent: int, chunks: list[int], seed: int) -> None:
    """Tokens and scores after every step; scores of those kept are carried over unchanged."""
    if heavy + recent == 0:
        return
    received = small_numbers(seed, len(chunks), 3, sum(chunks))
    rig = Rig(H2O(recent=recent), heavy + recent, received)
    slow = [SlowH2O(heavy=heavy, recent=recent) for _ in range(3)]
    for step, fresh in enumerate(chunks):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.given(step, head))
            assert rig.positions[head] == oracle.held
            assert rig.slots["score"][0, head].tolist() == [oracle.score[p] for p in oracle.held]
            assert set(range(max(rig.seen - recent, 0), rig.seen)) <= set(oracle.held)
            assert len(oracle.held) == min(rig.seen, heavy + recent)


@pytest.mark.parametrize("group", [1, 3])
def test_no_attention_is_lost(group: int) -> None:
    """Scores kept, and scores of tokens at their dropping, add up to one for every query."""
    chunks, tokens = [20, 1, 1, 9, 1, 1, 1, 14, 1, 1], 50
    layer = make_layer(H2O(recent=5), 12)
    player = Player(layer, 2, tokens, random_logits(3, 2 * group, tokens))
    before = torch.zeros(2, tokens, dtype=torch.float64)
    dropped = torch.zeros(2, dtype=torch.float64)
    for fresh in chunks:
        attention = player.advance(fresh)
        before += attention.double().view(2, group * fresh, tokens).sum(1)
        kept = layer.slots.position[0].long()
        gone = torch.ones(2, tokens, dtype=torch.bool).scatter_(1, kept, False)
        dropped += torch.where(gone, before, 0).sum(1)
        before.masked_fill_(gone, 0)
        total = dropped + layer.slots["score"][0].sum(-1)
        assert total.tolist() == pytest.approx([layer.get_seq_length() * group] * 2, rel=1e-5)


@pytest.mark.parametrize("recent", [0, 4])
def test_repeated_query_heads_choose_as_one(recent: int) -> None:
    """Grouped queries that are all alike vote alike, three times as loud."""
    logits = random_logits(5, 2, 60)
    alone = Player(make_layer(H2O(recent=recent), 10), 2, 60, logits)
    grouped = Player(make_layer(H2O(recent=recent), 10), 2, 60, logits.repeat_interleave(3, dim=0))
    for fresh in [25, *[1] * 20, 15]:
        alone.advance(fresh)
        grouped.advance(fresh)
        assert torch.equal(alone.kept, grouped.kept)
        scores = alone.layer.slots["score"], grouped.layer.slots["score"]
        torch.testing.assert_close(3 * scores[0], scores[1])


def test_without_heavy_hitters_it_is_a_window() -> None:
    """heavy = 0."""
    rig, window = Rig(H2O(recent=6), 6, small_numbers(1, 40, 1, 200)), SlowWindow(0, 6)
    for fresh in [9, 1, 1, 1, 4, 1, 20, 1]:
        rig.step(fresh)
        window.step(fresh)
        assert rig.positions == [window.held]


def test_without_a_window_the_newest_token_may_go_at_once() -> None:
    """recent = 0: all compete, ties go to the older token."""
    received = torch.zeros(5, 1, 5)
    received[:, 0, :3] = 1
    rig = Rig(H2O(recent=0), 3, received)
    for _ in range(5):
        rig.step(1)
    assert rig.positions == [[0, 1, 2]]


@pytest.mark.parametrize(("budget", "recent"), [(8, 4), (9, 5), (1, 1)])
def test_half_of_the_budget_is_window_by_default(budget: int, recent: int) -> None:
    """heavy = budget // 2, the rest is recent: seen when all attention goes to the first tokens."""
    received = torch.zeros(1, 1, 40)
    received[0, 0, :20] = torch.arange(20, 0, -1)
    rig = Rig(H2O(), budget, received)
    rig.step(40)
    heavy = budget - recent
    assert rig.positions == [[*range(heavy), *range(40 - recent, 40)]]


@pytest.mark.parametrize("turn", [0, 3, 7, 30])
def test_room_can_be_made_for_any_turn(turn: int) -> None:
    """Afterwards the turn fits, however long it is."""
    rig = Rig(H2O(), 12, small_numbers(2, 20, 2, 100))
    rig.step(40)
    rig.evict(12 - turn)
    assert all(len(held) == max(12 - turn, 0) for held in rig.positions)
    rig.step(turn + 1)
    assert all(len(held) <= 12 for held in rig.positions)


def test_it_asks_for_column_sums_only() -> None:
    """Which may come for several decoded tokens at once; and refuses a negative window."""
    assert H2O().needs == Needs(columns="sum", together=TOGETHER)
    with pytest.raises(ValueError, match="recent must be at least 0, got -1"):
        H2O(recent=-1)
