"""Scissorhands against a plain reading of the paper's policy, and the laws of its drops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvhive.policies.scissorhands import Scissorhands
from kvhive.recipe import Recipe
from tests.support import Feeder

from .rows import RowRig, random_logits, random_steps


@dataclass
class SlowScissorhands:
    """One KV head: for each remembered query, how many query heads found each position low."""

    budget: int
    history: int
    recent: int
    drop: int
    by_cache: bool = False
    held: list[int] = field(default_factory=list)
    memory: list[dict[int, int]] = field(default_factory=list)
    seen: int = 0

    def step(self, fresh: int, rows: list[dict[int, dict[int, float]]]) -> None:
        """Append and evict; rows: for every query head, what each query gave each position."""
        for query in range(self.seen, self.seen + fresh):
            self.held.append(query)
            share = torch.tensor(1.0) / (len(self.held) if self.by_cache else query + 1)
            low = {p: sum(bool(head[query][p] < share) for head in rows) for p in self.held}
            self.memory.append(low)
        self.memory = self.memory[-self.history :]
        self.seen += fresh
        if len(self.held) > self.budget:
            self.evict()

    def evict(self) -> None:
        """Drop the worst, older ones first, until budget - drop + 1 are left."""
        count = {p: sum(row.get(p, 0) for row in self.memory) for p in self.held}
        older = self.held[: len(self.held) - self.recent]
        worst = sorted(older, key=lambda p: (-count[p], p))
        gone = set(worst[: len(self.held) - (self.budget - self.drop + 1)])
        self.held = [p for p in self.held if p not in gone]


@pytest.mark.parametrize("threshold", ["seen", "cache"])
@pytest.mark.parametrize(
    ("budget", "history", "recent", "drop", "group"),
    [
        (20, 10, 4, 8, 1),
        (21, 13, 0, 21, 2),
        (30, 200, 9, 15, 3),
        (15, 1, 3, 1, 2),
        (17, 6, 2, 5, 8),
    ],
)
def test_as_the_rule_says(
    threshold: str, budget: int, history: int, recent: int, drop: int, group: int
) -> None:
    """Every head after every step, prompts, chunks and single tokens, and its size."""
    knobs: dict[str, Any] = {"history": history, "recent": recent, "drop": drop}
    policy = Scissorhands(**knobs, threshold=threshold)  # type: ignore[arg-type]
    rig = RowRig(policy, budget, random_logits(budget, 2 * group, 130), heads=2)
    slow = [SlowScissorhands(budget, **knobs, by_cache=threshold == "cache") for _ in range(2)]
    gone: list[set[int]] = [set(), set()]
    for fresh in random_steps(budget, 130, longest=25):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.rows[head * group : (head + 1) * group])
            held = rig.positions[head]
            assert held == oracle.held
            assert len(held) <= budget
            assert len(held) >= min(rig.seen, budget - drop + 1)
            assert held[len(held) - recent :] == list(range(rig.seen - recent, rig.seen))
            assert not gone[head] & set(held), "a dropped token never comes back"
            gone[head] = set(range(rig.seen)) - set(held)


def test_uniform_attention_drops_the_oldest() -> None:
    """All p = 1/t: nothing is low, and of equals the older goes."""
    rig = RowRig(Scissorhands(drop=6, recent=2), 16, torch.zeros(1, 60, 60), heads=1)
    for fresh in (12, 1, 1, 1, 1, 1, 9, 1, 1):
        rig.step(fresh)
        held = rig.positions[0]
        assert held == list(range(rig.seen - len(held), rig.seen))
        assert int(rig.slots["low"].sum()) == 0
    assert len(rig.positions[0]) == 13


def test_heads_of_a_group_may_change_places() -> None:
    """Counts are sums over the group."""
    logits = random_logits(5, 6, 80)
    swapped = logits[[2, 0, 1, 4, 5, 3]]
    rigs = [RowRig(Scissorhands(), 20, rows, heads=2) for rows in (logits, swapped)]
    for _ in range(80):
        for rig in rigs:
            rig.step(1)
        assert rigs[0].positions == rigs[1].positions


def test_defaults_follow_the_budget() -> None:
    """Half is dropped, a quarter but no more than ten is recent, twice the budget is remembered."""
    logits = random_logits(6, 2, 150)
    spelled = Scissorhands(history=48, recent=6, drop=12)
    rigs = [RowRig(policy, 24, logits, heads=2) for policy in (Scissorhands(), spelled)]
    for fresh in random_steps(6, 150, longest=30):
        for rig in rigs:
            rig.step(fresh)
        assert rigs[0].positions == rigs[1].positions


@pytest.mark.parametrize(("group", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (8, 4)])
def test_state_is_a_few_bits_a_query(group: int, bits: int) -> None:
    """The binary digits of the group size, for each of the queries remembered."""
    rig = RowRig(Scissorhands(history=64), 20, random_logits(7, group, 40), heads=1)
    rig.step(40)
    assert rig.slots["low"].shape == (1, 1, 11, bits, 8)


@pytest.mark.parametrize(
    ("knobs", "least"),
    [
        ({}, 1),
        ({"drop": 7}, 7),
        ({"recent": 5}, 9),
        ({"recent": 5, "drop": 7}, 12),
        ({"recent": 0}, 1),
    ],
)
def test_the_least_budget_leaves_more_than_the_recent_tokens(
    knobs: dict[str, int], least: int
) -> None:
    """And the budget below it would not."""
    policy = Scissorhands(**knobs)  # type: ignore[arg-type]
    assert policy.sizing.least == least
    rig = RowRig(policy, least, random_logits(8, 1, 30), heads=1)
    for _ in range(30):
        rig.step(1)
        held = rig.positions[0]
        assert len(held) <= least
        recent = min(policy.recent or 0, rig.seen)
        assert held[len(held) - recent :] == list(range(rig.seen - recent, rig.seen))


def test_a_smaller_budget_for_a_turn_is_met() -> None:
    """Making room cuts a head down to what was asked for, or further."""
    feeder = Feeder("scissorhands@40")
    feeder.step(90)
    for _ in range(12):
        feeder.step(1)
    before = feeder.layer.slots.position[0, 0].tolist()
    feeder.layer.make_room(15)
    after = feeder.layer.slots.position[0, 0].tolist()
    assert len(after) == 25 - 12 + 1
    assert set(after) < set(before)
    assert after[-6:] == before[-6:]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"history": 0}, "history must be between 1 and 65536, got 0"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"drop": 0}, "drop must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With the name of the knob, its value and the rule."""
    with pytest.raises(ValueError, match=f"^scissorhands: {message}"):
        Scissorhands(**knobs)


@pytest.mark.parametrize("knob", ["keep_fraction=0.2", "start=7", "decode=none"])
def test_settings_of_the_released_code_are_refused(knob: str) -> None:
    """They are for policy `scissorhands_percentile` only."""
    with pytest.raises(ValueError, match=f"^scissorhands has no knob '{knob.split('=')[0]}'"):
        Recipe.parse(f"scissorhands({knob})@100")


@pytest.mark.usefixtures("unchecked")
def test_a_word_that_is_no_choice_is_refused() -> None:
    """By the knob's own check, or before it by the type checks of the test run."""
    knobs: dict[str, Any] = {"threshold": "nonesuch"}
    with pytest.raises((ValueError, TypeError), match="threshold"):
        Scissorhands(**knobs)


def test_the_papers_policy_needs_a_budget() -> None:
    """And a budget that leaves no room beside the recent tokens is refused."""
    with pytest.raises(ValueError, match="scissorhands needs a budget"):
        Recipe.parse("scissorhands")
    with pytest.raises(ValueError, match="a budget of 19 is below 20"):
        Recipe.parse("scissorhands(recent=8, drop=12)@19")
