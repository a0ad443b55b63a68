"""TOVA against an oracle: the newest query decides, for all heads of the layer at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvhive.allocations import Allocation, Facts
from kvhive.kernels import Observed, Rows
from kvhive.policies.tova import Tova
from kvhive.slots import Slots
from kvhive.step import Step

from ..conformance.playing import Player, make_layer
from .rig import rows_of
from .rows import RowRig, random_logits, random_steps

HEADS, GROUP, TOKENS = 2, 3, 90


class SlowTova:
    """Positions held, chosen from dictionaries of probabilities."""

    def __init__(self, budget: int, protect_last: bool) -> None:
        self.budget, self.protect_last = budget, protect_last
        self.held: list[int] = []
        self.given: dict[int, float] = {}

    def step(self, fresh: int, rows: list[dict[int, dict[int, float]]]) -> None:
        """Append, and keep what the newest query attends to most on average; ties: the newer."""
        newest = max(rows[0])
        self.held += range(newest + 1 - fresh, newest + 1)
        self.given = {p: sum(head[newest][p] for head in rows) / len(rows) for p in self.held}
        safe = [newest] if self.protect_last else []
        ranked = sorted((p for p in self.held if p not in safe), key=lambda p: (-self.given[p], -p))
        self.held = sorted(safe + ranked[: self.budget - len(safe)])


@pytest.mark.parametrize("protect_last", [False, True])
@pytest.mark.parametrize("budget", [2, 7, 16, 200])
@pytest.mark.parametrize("seed", range(2))
def test_decisions_are_the_oracles(seed: int, budget: int, protect_last: bool) -> None:
    """After every step, one set for all KV heads, of min(n, budget) tokens."""
    rig = RowRig(
        Tova(protect_last=protect_last), budget, random_logits(seed, HEADS * GROUP, TOKENS), HEADS
    )
    slow = SlowTova(budget, protect_last)
    for fresh in random_steps(seed, TOKENS, 30):
        rig.step(fresh)
        slow.step(fresh, rig.rows)
        assert rig.positions == [slow.held] * HEADS
        assert len(slow.held) == min(rig.seen, budget)
        assert not protect_last or slow.held[-1] == rig.seen - 1


def test_the_least_attended_token_is_the_one_that_goes() -> None:
    """With one-token steps exactly one goes, and sometimes it is the newest itself."""
    rig = RowRig(Tova(), 8, random_logits(4, HEADS * GROUP, TOKENS), HEADS)
    rig.step(8)
    newest_went = 0
    while rig.seen < TOKENS:
        before = [*rig.positions[0], rig.seen]
        rig.step(1)
        given = {p: sum(h[rig.seen - 1][p] for h in rig.rows) for p in before}
        gone = set(before) - set(rig.positions[0])
        assert gone == {min(given, key=lambda p: given[p])}
        newest_went += rig.seen - 1 in gone
    assert newest_went


def test_equal_attention_keeps_the_newer() -> None:
    """With nothing to choose by, TOVA is a window."""
    rig = RowRig(Tova(), 5, torch.zeros(HEADS, 20, 20), HEADS)
    for fresh in (9, 1, 1, 4, 1):
        rig.step(fresh)
        assert rig.positions == [list(range(rig.seen - 5, rig.seen))] * HEADS


def test_the_order_of_query_heads_does_not_matter() -> None:
    """Any query head may stand anywhere, in any group."""
    logits = random_logits(6, HEADS * GROUP, TOKENS)
    shuffled = logits[torch.tensor([3, 0, 5, 2, 4, 1])]
    rigs = [RowRig(Tova(), 10, each, HEADS) for each in (logits, shuffled)]
    for fresh in (30, *[1] * 20, 13, 1):
        for rig in rigs:
            rig.step(fresh)
        assert rigs[0].positions == rigs[1].positions


@dataclass(frozen=True)
class ByHead(Allocation):
    """Heads of every layer get these."""

    tokens: tuple[int, ...] = ()

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """As given, whatever the budget."""
        return torch.tensor(self.tokens).expand(facts.layers, -1)


def test_heads_with_unequal_budgets_hold_parts_of_one_another() -> None:
    """An allocation may give heads different budgets: each still keeps the best of the layer."""
    layer = make_layer(Tova(), 9)
    layer.progress.limits.allocation = ByHead((6, 12, 9))
    player = Player(layer, 3, 70, random_logits(8, 6, 70))
    for fresh in (30, *[1] * 25, 7, *[1] * 8):
        player.advance(fresh)
        few, many, some = ({p for p in head if p >= 0} for head in player.kept.tolist())
        assert (len(few), len(many), len(some)) == (6, 12, 9)
        assert few < some < many


def test_a_padded_query_has_no_say() -> None:
    """What the last real query of the row said stays."""
    policy = Tova()
    slots = Slots(2, 1, policy.columns, {}, torch.device("cpu"))
    slots.append(Step.plain(0, 3), 3)
    first = torch.tensor([[[0.2, 0.3, 0.5]], [[0.6, 0.3, 0.1]]])
    policy.observe(slots, Observed(fresh=3, rows=Rows.of(first[:, :, None])))
    slots.append(rows_of(torch.tensor([[3], [-1]])), 4)
    second = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.0, 0.0, 0.0, 0.0]]])
    policy.observe(slots, Observed(fresh=1, rows=Rows.of(second[:, :, None])))
    expected = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.6, 0.3, 0.1, 0.0]]])
    assert torch.equal(slots["attention"], expected)


def test_it_asks_for_one_row_only() -> None:
    """No column sums, so that a prompt can go through a fused kernel."""
    needs = Tova().needs
    assert (needs.last_rows, needs.columns) == (1, None)


def heads_alike(logits: Tensor) -> Tensor:
    """Every query head thrice."""
    return logits.repeat_interleave(GROUP, 0)


def test_groups_of_like_heads_are_as_one() -> None:
    """Grouping changes nothing by itself."""
    logits = random_logits(2, HEADS, TOKENS)
    single = RowRig(Tova(), 9, logits, HEADS)
    grouped = RowRig(Tova(), 9, heads_alike(logits), HEADS)
    for fresh in (40, *[1] * 30):
        single.step(fresh)
        grouped.step(fresh)
        assert single.positions == grouped.positions
