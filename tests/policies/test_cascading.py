"""Cascading KV cache: scores, budgets, sinks, and how decoding with slack stays the same method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvhive.kernels import Observed
from kvhive.policies.cascading import Cascading
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from kvhive.step import Step
from tests.support import Feeder

from ._parts.test_cascade import SlowCascade
from .oracles import SlowWindow
from .rig import Rig, rows_of, small_numbers

STEPS = [30, 1, 1, 1, 9, 1, 1, 25, 1, 1, 1, 1, 40, *[1] * 30]


def levels(rig: Rig, head: int, number: int) -> list[list[int]]:
    """Positions in each level, oldest first; sinks and tokens not inserted yet are in none."""
    position, level = rig.slots.position[0, head], rig.slots["level"][0, head]
    return [position[level == index + 1].tolist() for index in range(number)]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("sink", "places", "number"), [(2, 4, 4), (0, 3, 3), (5, 1, 2), (3, 6, 1)])
def test_as_one_token_at_a_time(eager: bool, sink: int, places: int, number: int) -> None:
    """Every level of every head after every step; scores are those of the moment."""
    policy = Cascading(levels=number, sink=sink, places=places, eager_fill=eager, beta=0.5)
    received = small_numbers(sink, len(STEPS), 2, sum(STEPS))
    rig = Rig(policy, policy.sizing.implied, received)
    strides = [2**i for i in range(number)]
    last = number * places if eager else -1
    slow = [SlowCascade([places] * number, strides, last) for _ in range(2)]
    for fresh in STEPS:
        before = rig.seen
        held = before_eviction(rig, fresh)
        for head, oracle in enumerate(slow):
            for token in range(max(before, sink), rig.seen):
                oracle.insert(token - sink, {p - sink: s for p, s in held[head].items()})
            expected = [p + sink for level in oracle.levels for p in level]
            sinks = list(range(min(sink, rig.seen)))
            assert rig.positions[head] == sorted(sinks + expected)
            if not eager or rig.seen > sink + number * places:
                ours = [[p - sink for p in level] for level in levels(rig, head, number)]
                assert ours == oracle.levels


def before_eviction(rig: Rig, fresh: int) -> list[dict[int, float]]:
    """One step; returns each head's scores by position as they were when it evicted."""
    scores: list[dict[int, float]] = []
    evict = rig.evict

    def recorded(limit: int) -> None:
        for position, score in zip(rig.slots.position[0], rig.slots["score"][0], strict=True):
            scores.append(dict(zip(position.tolist(), score.tolist(), strict=True)))
        evict(limit)

    rig.evict = recorded  # type: ignore[method-assign]
    rig.step(fresh)
    rig.evict = evict  # type: ignore[method-assign]
    return scores


def test_one_level_is_sinks_and_a_window() -> None:
    """Scores decide nothing then."""
    rig = Rig(Cascading(levels=1, sink=3), 15, small_numbers(0, len(STEPS), 1, sum(STEPS)))
    slow = SlowWindow(sink=3, recent=12)
    for fresh in STEPS:
        rig.step(fresh)
        slow.step(fresh)
        assert rig.positions[0] == slow.held


def test_a_chunk_scores_as_its_tokens_would() -> None:
    """Nothing evicted: one step of 40 queries gives the score that 40 steps give."""
    whole, single = (Feeder("cascading(reduce=mean, beta=0.9)@200") for _ in range(2))
    for feeder in (whole, single):
        feeder.step(30)
    whole.step(40)
    for _ in range(40):
        single.step(1)
    ours, theirs = (feeder.layer.slots["score"] for feeder in (whole, single))
    assert torch.allclose(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["max", "mean", "median"])
@pytest.mark.parametrize("homogeneous", [False, True])
def test_heads_make_one_score(reduce: str, homogeneous: bool) -> None:
    """Of the group, or of all heads; beta fades what was, and weighs what is new."""
    policy = Cascading(reduce=reduce, homogeneous=homogeneous, beta=0.75)  # type: ignore[arg-type]
    columns = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(1))
    slots = Slots(1, 2, policy.columns, policy.counters, torch.device("cpu"))
    slots.append(Step.plain(0, 5), 5)
    slots["score"].fill_(8.0)
    policy.observe(slots, Observed(fresh=2, columns=columns))
    for head in range(2):
        mine = columns[0] if homogeneous else columns[0, 3 * head : 3 * head + 3]
        ranked = mine.sort(0).values
        one = {"max": ranked[-1], "mean": mine.mean(0), "median": ranked[(len(mine) - 1) // 2]}
        expected = 0.75**2 * 8 + 0.25 * one[reduce]
        assert torch.allclose(slots["score"][0, head], expected)


def test_padding_fades_no_score() -> None:
    """A row that says less in a step fades less."""
    policy = Cascading(beta=0.5)
    slots = Slots(2, 1, policy.columns, policy.counters, torch.device("cpu"))
    slots.append(rows_of(torch.tensor([[0, 1, 2, 3], [-1, -1, -1, 0]])), 4)
    slots["score"].fill_(16.0)
    policy.observe(slots, Observed(fresh=4, columns=torch.zeros(2, 2, 4)))
    assert slots["score"][:, 0, -1].tolist() == [1.0, 8.0]


@pytest.mark.parametrize(
    ("budget", "sink", "sizes"), [(48, 3, [12, 11, 11, 11]), (1000, 62, [236, 234, 234, 234])]
)
def test_a_budget_is_used_up(budget: int, sink: int, sizes: list[int]) -> None:
    """A sixteenth for sinks, the rest split; what is left over goes to the newest level."""
    rig = Rig(Cascading(), budget, small_numbers(1, 2, 1, 4 * budget))
    rig.step(4 * budget - 1)
    rig.step(1)
    assert rig.positions[0][:sink] == list(range(sink))
    assert [len(level) for level in levels(rig, 0, 4)] == sizes
    assert len(rig.positions[0]) == budget


class Fixed(Cascading):
    """Scores that depend on the position alone."""

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Any numbers, with ties."""
        slots["score"].copy_(slots.position * 7 % 5)


def test_decoding_with_slack_is_feeding_chunks() -> None:
    """What gathers until the budget is reached is inserted as the tokens of a chunk are.

    So decoding token by token with a slack of 9 keeps what a cache of the smaller size keeps that
    is fed the same tokens in chunks of ten.
    """
    lazy, chunked = (Rig(Fixed(levels=3, sink=2), 31) for _ in range(2))
    for rig in (lazy, chunked):
        rig.step(60)
    for step in range(90):
        lazy.budget = 31 if lazy.slots.length == 40 else 40
        lazy.step(1)
        if step % 10 == 9:
            chunked.step(10)
            assert lazy.positions == chunked.positions


def test_room_for_a_turn_and_a_larger_budget_afterwards() -> None:
    """Levels shorten and lengthen; sinks stay, order stays, and nothing returns."""
    rig = Rig(Cascading(sink=4), 60, small_numbers(3, 120, 2, 300))
    gone: set[int] = set()
    for step, fresh in enumerate([150, *[1] * 20, 30, *[1] * 60]):
        rig.budget = (60, 33, 8, 47)[step % 4]
        rig.step(fresh)
        for held in rig.positions:
            assert held == sorted(held)
            assert len(held) <= rig.budget
            assert held[:4] == [0, 1, 2, 3]
            assert held[-1] == rig.seen - 1
        assert not gone & set(rig.positions[0])
        gone = set(range(rig.seen)) - set(rig.positions[0])


def test_a_turn_that_takes_even_the_sinks_room() -> None:
    """A default number of sinks gives way to a budget below it."""
    rig = Rig(Cascading(), 320, small_numbers(4, 5, 1, 1000))
    rig.step(900)
    assert rig.positions[0][:20] == list(range(20))
    rig.evict(10)
    assert rig.positions[0][:6] == list(range(6))
    assert len(rig.positions[0]) == 10
    rig.step(1)
    rig.evict(10)
    assert len(rig.positions[0]) == 10


def test_recipes() -> None:
    """`places` fixes the budget; without eager fill the method sizes itself then."""
    recipe = Recipe.parse("cascading(sink=4, places=8)")
    assert recipe.budget is not None
    assert recipe.budget.tokens == 36
    assert Recipe.parse("cascading(places=100)").policy.sizing.implied == 425
    assert Recipe.parse("cascading(sink=4, places=8, eager_fill=false)").budget is None
    assert Recipe.parse("cascading(levels=2, strides=[1, 3])@90").policy.sizing.least == 3
    with pytest.raises(ValueError, match="cascading needs a budget"):
        Recipe.parse("cascading(sink=4)")
    with pytest.raises(ValueError, match="a budget of 67 is below 68"):
        Recipe.parse("cascading(sink=64)@67")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"levels": 0}, "levels must be between 1 and 32, got 0"),
        ({"levels": 33}, "levels must be between 1 and 32, got 33"),
        ({"sink": -1}, "sink must be at least 0, got -1"),
        ({"places": 0}, "places must be at least 1, got 0"),
        ({"beta": 1.0}, r"beta must lie in \(0, 1\), got 1.0"),
        ({"strides": (1, 2)}, r"strides must be 4 numbers, one a level, got \[1, 2\]"),
        ({"strides": (1, 2, 0, 4)}, "strides must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With the name of the knob, its value and the rule."""
    with pytest.raises(ValueError, match=f"^cascading: {message}"):
        Cascading(**knobs)


@pytest.mark.usefixtures("unchecked")
def test_a_word_that_is_no_choice_is_refused() -> None:
    """By the knob's own check, or before it by the type checks of the test run."""
    knobs: dict[str, Any] = {"reduce": "sum"}
    with pytest.raises((ValueError, TypeError), match="reduce"):
        Cascading(**knobs)
