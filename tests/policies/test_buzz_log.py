"""BUZZ with a logarithmic history: the rule against an oracle, and its logarithmic bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.kernels import Observed
from kvhive.policies.buzz_log import BuzzLog, generations
from kvhive.recipe import Recipe
from kvhive.step import Step
from tests.support import make_layer

from .oracles import SlowLog
from .rig import Rig, small_numbers
from .test_buzz import CHUNKS, SEEDS

SIZES = {"sink": st.integers(0, 4), "window": st.integers(1, 7), "stride": st.integers(1, 5)}


def same_decisions(rig: Rig, slow: list[SlowLog], chunks: list[int]) -> None:
    """Tokens, history sizes and generations agree after every step."""
    for step, fresh in enumerate(chunks):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.given(step, head))
        assert rig.positions == [oracle.held for oracle in slow]
        assert rig.slots.counters["sample"].tolist() == [[len(oracle.history) for oracle in slow]]
        levels = rig.slots["level"][0][rig.slots.valid[0]].tolist()
        expected = [dict((p, g) for g, p in oracle.history) for oracle in slow]
        assert levels == [
            cells.get(p, 0)
            for cells, held in zip(expected, rig.positions, strict=True)
            for p in held
        ]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    cells=st.integers(1, 4),
    variant=st.sampled_from(["accum", "fast", "no_max"]),
    chunks=CHUNKS,
    seed=SEEDS,
)
def test_sizing_itself_it_decides_as_the_oracle(
    sizes: dict[str, int], cells: int, variant: Any, chunks: list[int], seed: int
) -> None:
    """Without a budget, by cells and window alone."""
    received = small_numbers(seed, len(chunks), 2, sum(chunks))
    rig = Rig(BuzzLog(variant=variant, cells=cells, **sizes), None, received)
    flags = {"sums": variant == "accum", "judged": variant != "no_max"}
    slow = [SlowLog(cells=cells, **flags, **sizes) for _ in range(2)]
    same_decisions(rig, slow, chunks)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    more_room=st.integers(0, 30),
    cells=st.sampled_from([None, None, 1, 3]),
    variant=st.sampled_from(["accum", "no_max"]),
    chunks=CHUNKS,
    seed=SEEDS,
)
def test_in_a_budget_it_decides_as_the_oracle(
    sizes: dict[str, int],
    more_room: int,
    cells: int | None,
    variant: Any,
    chunks: list[int],
    seed: int,
) -> None:
    """However many cells are asked for, no head ever exceeds the budget."""
    room = 2 * sizes["stride"] + more_room
    budget = sizes["sink"] + sizes["window"] + room
    received = small_numbers(seed, len(chunks), 2, sum(chunks))
    rig = Rig(BuzzLog(variant=variant, cells=cells, **sizes), budget, received)
    flags = {"sums": variant == "accum", "judged": variant != "no_max"}
    slow = [SlowLog(cells=cells, room=room, **flags, **sizes) for _ in range(2)]
    same_decisions(rig, slow, chunks)
    assert all(len(held) <= budget for held in rig.positions)


@settings(max_examples=15, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), cells=st.integers(1, 5))
def test_token_by_token_it_keeps_to_its_bound(sizes: dict[str, int], cells: int) -> None:
    """sink + window + cells * (stride + generations) at every token; events are spread out."""
    rig = Rig(BuzzLog(variant="no_max", cells=cells, **sizes), None)
    last, before = -1, 0
    for token in range(400):
        rig.step(1)
        kept = rig.slots.length
        depth = generations(token + 1, sizes["stride"])
        assert kept <= sizes["sink"] + sizes["window"] + cells * (sizes["stride"] + depth)
        assert rig.positions[0][: sizes["sink"]] == list(range(min(sizes["sink"], token + 1)))
        if kept <= before:
            assert last < 0 or token - last >= (cells - 1) * sizes["stride"] + 2
            last = token
        before = kept


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    cells=st.integers(2, 6),
    chunks=CHUNKS,
    rounds=st.integers(1, 4),
)
def test_a_cell_is_no_longer_than_its_distance_allows(
    sizes: dict[str, int], cells: int, chunks: list[int], rounds: int
) -> None:
    """A cell of generation g spans stride * 2^(g-1) <= stride + distance / (cells - 1) tokens."""
    rig, stride = Rig(BuzzLog(variant="no_max", cells=cells, **sizes), None), sizes["stride"]
    for fresh in chunks * rounds:
        rig.step(fresh)
        begin, size = sizes["sink"], int(rig.slots.counters["sample"][0, 0])
        starts = rig.positions[0][begin : begin + size + 1]  # and the first fresh token
        levels = rig.slots["level"][0, 0, begin : begin + size].tolist()
        for level, start, stop in zip(levels, starts[:-1], starts[1:], strict=True):
            assert stop - start == stride * 2 ** (level - 1)
            assert (stop - start - stride) * (cells - 1) <= starts[-1] - stop


def octaves_represented(held: list[int], seen: int, first: int) -> bool:
    """Whether each range of ages [a, 2a) from `first` up to the oldest token holds a token."""
    ages = [seen - 1 - p for p in held]
    starts = [first * 2**k for k in range(int(math.log2(seen / first)))]
    return all(any(a <= age < 2 * a for age in ages) for a in starts)


@pytest.mark.parametrize("variant", ["no_max", "fast"])
def test_a_million_tokens(variant: Any) -> None:
    """The bound holds, it is logarithmic, and every octave of ages is represented all along."""
    sink, window, cells, stride = 4, 64, 64, 8
    policy = BuzzLog(variant=variant, sink=sink, window=window, cells=cells, stride=stride)
    rig, chunk, largest = Rig(policy, None), cells * stride, 0
    generator = torch.Generator().manual_seed(7)
    while rig.seen < 1_000_000:
        rig.slots.append(Step.plain(rig.seen, chunk), rig.slots.length + chunk)
        rig.seen += chunk
        columns = torch.rand(1, 1, rig.slots.length, generator=generator)
        policy.observe(rig.slots, Observed(chunk, columns if variant == "fast" else None))
        rig.evict(rig.limit)
        largest = max(largest, rig.slots.length)
        depth = math.floor(math.log2(rig.seen / stride)) + 2
        assert rig.slots.length <= sink + window + cells * (stride + depth)
        if rig.seen % (chunk * 64) == 0:
            assert octaves_represented(rig.positions[0][sink:], rig.seen, window + 2 * chunk)
    assert octaves_represented(rig.positions[0][sink:], rig.seen, window + 2 * chunk)
    assert largest <= 4 + 64 + 64 * (8 + 17)
    assert int(rig.slots["level"].max()) >= 10


def test_a_million_tokens_in_a_fixed_budget() -> None:
    """Never over it; the cells a generation shrink as generations come up."""
    budget, sink = 768, 4
    rig = Rig(BuzzLog(variant="no_max"), budget)
    while rig.seen < 1_000_000:
        rig.step(1000)
        assert rig.slots.length <= budget
        if rig.seen % 40_000 == 0:
            assert octaves_represented(rig.positions[0][sink:], rig.seen, 2 * budget)
    assert octaves_represented(rig.positions[0][sink:], rig.seen, 2 * budget)


def test_without_room_for_a_cell_nothing_is_history() -> None:
    """Sinks and the newest tokens stay, and cells among those are plain tokens again."""
    rig = Rig(BuzzLog(variant="no_max", sink=2, window=4, stride=5), 18)
    rig.step(42)
    (before,) = rig.positions
    assert int(rig.slots["level"][0, 0, len(before) - 7]) > 0, "a cell is among the newest"
    rig.evict(9)
    assert rig.positions == [before[:2] + before[-7:]]
    assert int(rig.slots["level"].max()) == int(rig.slots.counters["sample"].max()) == 0


@given(seen=st.integers(0, 10**9), stride=st.integers(1, 50))
def test_generations_are_as_many_as_spans_fit(seen: int, stride: int) -> None:
    """A cell of generation g spans stride * 2^(g-1) tokens: the last that fits, or one more."""
    depth = generations(seen, stride)
    assert stride * 2**depth > seen
    assert depth == 1 or stride * 2 ** (depth - 2) < seen


@pytest.mark.parametrize("budget", [40, 64, 200, 1000])
def test_cells_follow_from_the_budget(budget: int) -> None:
    """All generations together fill three quarters of the room at most, unless that is less than
    one each.
    """
    rig = Rig(BuzzLog(variant="no_max"), budget)
    for fresh in [3 * budget] + [1] * 50 + [5 * budget] * 5:
        rig.step(fresh)
    sink, window = 4, round((budget - 4) * 2 / 7)
    depth = generations(rig.seen, 5)
    most = max(3 * (budget - sink - window) // 4, depth)
    assert int(rig.slots.counters["sample"].max()) <= most


def test_a_recipe_needs_cells_and_window_to_do_without_a_budget() -> None:
    """The string form, and the limit a layer then uses."""
    recipe = Recipe.parse("buzz_log(cells=8, window=32)")
    assert recipe.budget is None
    layer = make_layer(recipe)
    keys = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(3))
    for token in range(300):
        layer.update(keys, keys)
        layer.attend(keys, 0.5)
        assert layer.slots.length <= 4 + 32 + 8 * (5 + generations(token + 1, 5))
    assert layer.slots.length < 150
    with pytest.raises(ValueError, match="buzz_log needs a budget"):
        Recipe.parse("buzz_log(cells=8)")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sink": -1}, "sink must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"cells": 0}, "cells must be at least 1, got 0"),
        ({"threshold": 9}, r"threshold must be at least 2 \* stride = 10, got 9"),
        ({"threshold": 5, "stride": 3}, r"threshold must be at least 2 \* stride = 6, got 5"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With the name of the knob, its value and the rule: room for two cells at least."""
    with pytest.raises(ValueError, match=message):
        BuzzLog(**knobs)
    BuzzLog(threshold=10)


@pytest.mark.usefixtures("unchecked")
def test_words_that_are_no_choice_are_refused() -> None:
    """By the knob's own check, or before it by the type checks of the test run."""
    knobs: dict[str, Any] = {"variant": "nonesuch"}
    with pytest.raises((ValueError, TypeError), match="variant"):
        BuzzLog(**knobs)
