"""CORM against a plain reading of its rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvhive.policies.corm import Corm
from kvhive.recipe import Recipe

from .rows import RowRig, random_logits, random_steps


@dataclass
class SlowCorm:
    """One KV head: which positions each remembered query found important."""

    window: int
    recent: int
    cap: int | None = None
    by_cache: bool = False
    held: list[int] = field(default_factory=list)
    memory: list[set[int]] = field(default_factory=list)
    seen: int = 0

    def step(self, fresh: int, rows: list[dict[int, dict[int, float]]]) -> None:
        """Append and evict; rows: for every query head, what each query gave each position."""
        for query in range(self.seen, self.seen + fresh):
            self.held.append(query)
            number = len(self.held) if self.by_cache else query + 1
            share = torch.tensor(1.0) / number
            self.memory.append(
                {p for p in self.held if any(head[query][p] >= share for head in rows)}
            )
        self.memory = self.memory[-self.window :]
        self.seen += fresh
        if self.seen >= self.window:
            self.evict()

    def evict(self) -> None:
        """Keep what has a vote and what is recent."""
        tail = self.held[-self.recent :]
        votes = {p: sum(p in row for row in self.memory) for p in self.held}
        voted = [p for p in self.held if votes[p] and p not in tail]
        if self.cap is not None:
            voted = sorted(voted, key=lambda p: (-votes[p], -p))[: self.cap - len(tail)]
        self.held = sorted(voted) + tail


@pytest.mark.parametrize("threshold", ["seen", "cache"])
@pytest.mark.parametrize("cap", [None, 17])
@pytest.mark.parametrize(("window", "group", "seed"), [(5, 1, 0), (8, 2, 1), (11, 3, 2)])
def test_as_the_rule_says(
    threshold: str, cap: int | None, window: int, group: int, seed: int
) -> None:
    """Every head after every step, prompts, chunks and single tokens."""
    policy = Corm(history=window, recent=6, threshold=threshold, cap=cap)  # type: ignore[arg-type]
    rig = RowRig(policy, None, random_logits(seed, 2 * group, 120), heads=2)
    slow = [SlowCorm(window, 6, cap, threshold == "cache") for _ in range(2)]
    smallest = 120
    for fresh in random_steps(seed, 120, longest=20):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.rows[head * group : (head + 1) * group])
            assert rig.positions[head] == oracle.held
            smallest = min(smallest, len(oracle.held) if oracle.seen > 60 else 120)
    assert smallest < 60, "the rule must have dropped something"


def test_a_budget_waits_until_it_is_exceeded() -> None:
    """Nothing is dropped below it; then the rule holds, and the budget with it."""
    policy = Corm(history=6, recent=5)
    rig = RowRig(policy, 24, random_logits(3, 2, 100), heads=2)
    fell_below = False
    for _ in range(100):
        before = [list(held) for held in rig.positions]
        rig.step(1)
        for held, now in zip(before, rig.positions, strict=True):
            grown = [*held, rig.seen - 1]
            assert now == grown if len(grown) <= 24 else len(now) <= 24
            assert now[-5:] == grown[-5:]
            fell_below = fell_below or len(now) < len(held)
    assert fell_below, "the rule and not the budget alone must have decided"


def test_uniform_attention_keeps_everything() -> None:
    """p = 1/t counts as important."""
    rig = RowRig(Corm(history=4, recent=2), None, torch.zeros(2, 40, 40), heads=1)
    for fresh in (13, 1, 1, 7, 1, 17):
        rig.step(fresh)
    assert rig.positions == [list(range(40))]


def test_one_hot_attention_leaves_that_key_and_the_newest() -> None:
    """After `history` such queries."""
    logits = torch.full((1, 30, 30), -50.0)
    logits[:, :, 4] = 50.0
    rig = RowRig(Corm(history=5, recent=3), None, logits, heads=1)
    for _ in range(30):
        rig.step(1)
    assert rig.positions == [[4, 27, 28, 29]]


def test_nothing_is_dropped_before_enough_queries_were_seen() -> None:
    """Nor without need: the rule starts with query number `history`."""
    rig = RowRig(Corm(history=20, recent=1), None, random_logits(4, 1, 30), heads=1)
    for step in range(1, 20):
        rig.step(1)
        assert rig.positions == [list(range(step))]
    rig.step(1)
    assert len(rig.positions[0]) < 20


def test_every_defers_the_drop() -> None:
    """Tokens pile up until the tokens seen are a multiple; then the same rule holds."""
    rig = RowRig(Corm(history=4, recent=2, every=8), None, random_logits(5, 1, 64), heads=1)
    sizes = []
    for _ in range(64):
        rig.step(1)
        sizes.append(len(rig.positions[0]))
    falls = [i + 1 for i in range(1, 64) if sizes[i] < sizes[i - 1]]
    assert falls
    assert all(seen % 8 == 0 for seen in falls)


def test_a_group_of_equal_heads_is_one_head() -> None:
    """The union of equal votes is one vote."""
    logits = random_logits(6, 1, 60)
    single = RowRig(Corm(history=5, recent=4), None, logits, heads=1)
    double = RowRig(Corm(history=5, recent=4), None, logits.expand(2, -1, -1), heads=1)
    for _ in range(60):
        single.step(1)
        double.step(1)
    assert single.positions == double.positions


@pytest.mark.parametrize(("seen", "window"), [(10, 16), (300, 18), (4096, 256), (100_000, 256)])
def test_defaults_follow_the_tokens_seen(seen: int, window: int) -> None:
    """A sixteenth, within 16 and 256; nothing is dropped before as many queries."""
    assert Corm().sizing.alone(seen) == (0 if seen >= window else seen)


def test_recipes_with_and_without_a_budget() -> None:
    """It sizes itself, or is held to a budget, or to its cap."""
    assert Recipe.parse("corm").budget is None
    assert Recipe.parse("corm(cap=64)").policy.sizing.alone(70) == 0
    assert str(Recipe.parse("corm(recent=8)@0.4").budget) == "0.4"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"history": 0}, "history must be at least 1, got 0"),
        ({"recent": 0}, "recent must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"cap": 8, "recent": 8}, r"cap must be at least recent \+ 1 = 9, got 8"),
    ],
)
def test_bad_knobs(knobs: dict[str, int], message: str) -> None:
    """One sentence with knob, rule and value."""
    with pytest.raises(ValueError, match=f"^corm: {message}"):
        Corm(**knobs)  # type: ignore[arg-type]
