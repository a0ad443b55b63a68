"""BUZZ: budgets, their regions, room for a turn, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.policies.buzz import Buzz
from kvhive.policies.buzz_log import BuzzLog
from kvhive.recipe import Recipe

from .rig import Rig, small_numbers
from .test_buzz import SEEDS, SIZES, budget_of, fed


@pytest.mark.parametrize(
    ("budget", "regions"),
    [(564, (4, 160, 400)), (31, (1, 9, 21)), (32, (4, 8, 20)), (4, (1, 1, 2))],
)
def test_a_budget_is_split_in_the_references_proportions(
    budget: int, regions: tuple[int, int, int]
) -> None:
    """Sinks, window 2/7 of the rest, threshold 5/7: seen in the size after one event."""
    sink, window, threshold = regions
    rig = fed(Rig(Buzz(variant="no_max", preset="paper"), budget), [budget + 1])
    stride = 5
    kept = list(range(sink)) + list(range(sink, sink + threshold + 1, stride))
    assert rig.positions == [kept + list(range(budget + 1 - window, budget + 1))]


@settings(max_examples=200, deadline=None)
@given(
    knobs=st.fixed_dictionaries(
        {},
        optional={
            "sink": st.integers(0, 40),
            "window": st.integers(1, 60),
            "threshold": st.integers(12, 60),
            "stride": st.integers(3, 6),
        },
    ),
    method=st.sampled_from([Buzz, BuzzLog]),
    above=st.integers(0, 40),
)
def test_every_budget_that_is_let_through_works(
    knobs: dict[str, Any], method: type[Buzz | BuzzLog], above: int
) -> None:
    """From the least budget upwards: never over it, window and sinks kept, whatever is left out."""
    policy = method(variant="no_max", **knobs)
    implied = policy.sizing.implied
    budget = policy.sizing.least + above if implied is None else implied
    assert budget >= policy.sizing.least
    rig = fed(Rig(policy, budget), [3 * budget, 1, 2 * budget, budget + 1])
    (held,) = rig.positions
    sink = knobs.get("sink", 4 if budget >= 32 or implied is not None else 1)
    assert len(held) <= budget
    assert held[:sink] == list(range(sink))
    window = knobs.get("window", 1)
    assert held[-window:] == list(range(rig.seen - window, rig.seen))


def test_matching_the_mean_raises_the_peak() -> None:
    """Then it is the average while decoding that meets the budget."""
    policy = Buzz(variant="no_max", match="mean")
    peak = policy.sizing.peak(410)
    assert peak == 564
    rig = fed(Rig(policy, peak), [2000] + [1] * 400)
    sizes = []
    for _ in range(308 * 2):
        rig.step(1)
        sizes.append(rig.slots.length)
    assert max(sizes) == peak
    assert sum(sizes) / len(sizes) == pytest.approx(410, abs=4)
    assert Buzz().sizing.peak(410) == 410


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    prompt=st.integers(1, 120),
    turn=st.integers(0, 60),
    method=st.sampled_from([Buzz, BuzzLog]),
    seed=SEEDS,
)
def test_room_can_be_made_for_any_turn(
    sizes: dict[str, Any], prompt: int, turn: int, method: type[Buzz | BuzzLog], seed: int
) -> None:
    """Down to the sinks alone, always with the newest tokens, and the cache goes on afterwards.

    The history is counted right all along: with nothing left of it, no token is of a generation.
    """
    sizes = sizes | {"threshold": sizes["threshold"] + 14}
    budget, after = budget_of(sizes), 40
    received = small_numbers(seed, 1 + after, 2, prompt + after)
    rig = fed(Rig(method(**sizes), budget, received), [prompt])
    rig.evict(budget - turn)
    for held in rig.positions:
        assert len(held) <= max(budget - turn, sizes["sink"])
        newest = min(sizes["window"], budget - turn - sizes["sink"], prompt)
        if newest > 0:
            assert held[-newest:] == list(range(prompt - newest, prompt))
    for _ in range(after):
        if method is BuzzLog:
            history = (rig.slots["level"] > 0).sum(-1)
            assert torch.equal(rig.slots.counters["sample"].long(), history)
        rig.step(1)
        for held in rig.positions:
            assert len(held) <= budget
            assert held[: sizes["sink"]] == list(range(min(sizes["sink"], rig.seen)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sink": -1}, "sink must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1"),
        ({"threshold": 1}, "threshold must be at least 2"),
        ({"stride": 2}, "stride must be at least 3, got 2; .* grows for ever"),
        ({"stride": 0, "allow_unbounded": True}, "stride must be at least 1"),
        ({"stride": 2, "allow_unbounded": True, "prefill": "streamed"}, "needs a stride of 3"),
        ({"match": "mean", "window": 9}, "match='mean' sizes window"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With the name of the knob, its value and the rule."""
    with pytest.raises(ValueError, match=message):
        Buzz(**knobs)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("buzz(cells=3)@100", "buzz has no knob 'cells'"),
        ("buzz_log(drain=false)@100", "buzz_log has no knob 'drain'"),
        ("buzz_log(prefill=streamed)@100", "buzz_log has no knob 'prefill'"),
        ("buzz_log(prefill_stride=fit)@100", "buzz_log has no knob 'prefill_stride'"),
        ("buzz_log(match=mean)@100", "buzz_log has no knob 'match'"),
        ("buzz_log(allow_unbounded=true)@100", "buzz_log has no knob 'allow_unbounded'"),
    ],
)
def test_settings_of_the_other_history_are_refused(recipe: str, message: str) -> None:
    """The thinning sample has no cells; cells in generations are neither drained nor fitted."""
    with pytest.raises(ValueError, match=message):
        Recipe.parse(recipe)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["variant", "prefill", "prefill_stride", "match"])
def test_words_that_are_no_choice_are_refused(name: str) -> None:
    """By the knob's own check, or before it by the type checks of the test run."""
    knobs: dict[str, Any] = {name: "nonesuch"}
    with pytest.raises((ValueError, TypeError), match=name):
        Buzz(**knobs)


def test_unbounded_growth_must_be_asked_for() -> None:
    """With stride 2 nothing old is ever thinned."""
    sizes = {"sink": 1, "window": 2, "threshold": 4, "stride": 2}
    rig = fed(Rig(Buzz(variant="no_max", allow_unbounded=True, **sizes), 7), [1] * 40)
    assert rig.slots.length > 15


def test_a_recipe_knows_the_budget_that_its_knobs_imply() -> None:
    """All three sizes given: no budget need be written, and no other is accepted."""
    recipe = Recipe.parse("buzz(window=160, threshold=400)")
    assert recipe.budget is not None
    assert recipe.budget.tokens == 564
    with pytest.raises(ValueError, match="add up to a budget of 564"):
        Recipe.parse("buzz(window=160, threshold=400)@500")
