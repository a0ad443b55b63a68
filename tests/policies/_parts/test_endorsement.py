"""The released code of Scissorhands against a loop over queries and keys."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kvhive.policies._parts import endorsement
from kvhive.policies._parts.endorsement import Rule, endorse
from kvhive.policies.scissorhands_percentile import ScissorhandsPercentile
from kvhive.slots import Column, Slots
from kvhive.step import Step
from tests.support import Feeder

CPU = torch.device("cpu")


@dataclass
class SlowEndorsement:
    """One KV head, one query at a time."""

    rule: Rule
    held: list[int] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)
    seen: int = 0

    def step(self, fresh: int, logits: Tensor) -> list[set[int]]:
        """Append; logits `[query heads, tokens, tokens]`. Returns what each new query sees."""
        new = range(self.seen, self.seen + fresh)
        self.held += new
        self.seen += fresh
        return [self.query(query, logits[:, query]) for query in new]

    def query(self, query: int, logits: Tensor) -> set[int]:
        """What one query sees; it endorses some of that."""
        keys = [p for p in self.held if p <= query]
        sees = {p for p in keys if self.visible(p, query)}
        for head in logits:
            full = head[keys].softmax(-1)
            padded = sorted(full.tolist() + [0.0] * (len(self.held) - len(keys)))
            threshold = padded[int((1 - self.rule.keep_fraction) * len(self.held) + 1e-9)]
            order = sorted(sees)
            pruned = full if order == keys else head[order].softmax(-1)
            for position, weight in zip(order, pruned.tolist(), strict=True):
                if weight > threshold:
                    self.last[position] = query
        return sees

    def visible(self, position: int, query: int) -> bool:
        """Recent, or endorsed by one of the queries remembered, or all before the start."""
        voted = self.last.get(position, -(10**9)) >= query - self.rule.history
        return query < self.rule.start or position >= query - self.rule.recent or voted

    def evict(self) -> None:
        """Keep what the next query may see."""
        self.held = [p for p in self.held if self.visible(p, self.seen)]


RULES = [
    Rule(history=16, recent=4, start=16, keep_fraction=0.1),
    Rule(history=5, recent=0, start=0, keep_fraction=0.2),
    Rule(history=40, recent=7, start=90, keep_fraction=0.05),
]


def drawn(seed: int, heads: int, kv_heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Queries `[1, heads, tokens, 8]` and keys `[1, kv_heads, tokens, 8]`."""
    source = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, tokens, 8), (1, kv_heads, tokens, 8))
    query, keys = (torch.randn(shape, generator=source) for shape in shapes)
    return query, keys


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_every_query_sees_what_a_loop_says(rule: Rule, group: int) -> None:
    """A prompt of more than one block."""
    tokens = 2 * endorsement.BLOCK + 9
    query, keys = drawn(group, 2 * group, 2, tokens)
    slots = Slots(1, 2, {"endorsed": Column(torch.int32)}, {}, CPU)
    slots.append(Step.plain(0, tokens), tokens)
    seen = torch.stack([*endorse(rule, slots, slots["endorsed"], query, keys, 0.5)], 2)
    logits = query[0] @ keys[0].repeat_interleave(group, 0).transpose(-1, -2) * 0.5
    pruned = 0
    for head in range(2):
        slow = SlowEndorsement(rule)
        rows = slow.step(tokens, logits[head * group : (head + 1) * group])
        for number, sees in enumerate(rows):
            assert set(seen[0, head, number].nonzero().flatten().tolist()) == sees
            pruned += number + 1 - len(sees)
    assert pruned > 0


@pytest.mark.parametrize("decode", ["stream", "none"])
def test_prompt_chunks_and_single_tokens(decode: str) -> None:
    """Through the layer: what is left after every step; `decode="none"` keeps what is decoded."""
    policy = f"scissorhands_percentile(history=12, recent=3, start=20, decode={decode})"
    feeder = Feeder(policy)
    scale, group = feeder.width**-0.5, feeder.heads // feeder.kv_heads
    rule = feeder.layer.policy.rule  # type: ignore[attr-defined]
    slow = [SlowEndorsement(rule) for _ in range(feeder.kv_heads)]
    keys = feeder.keys[0, :, :200].repeat_interleave(group, 0)
    logits = feeder.queries[0, :, :200] @ keys.transpose(-1, -2) * scale
    shrank = False
    for fresh in [60, *[1] * 25, 30, *[1] * 25]:
        feeder.step(fresh)
        for head, oracle in enumerate(slow):
            before = len(oracle.held)
            oracle.step(fresh, logits[head * group : (head + 1) * group])
            if fresh > 1 or decode == "stream":
                oracle.evict()
            held = feeder.layer.slots.position[0, head]
            assert held[held >= 0].tolist() == oracle.held
            shrank = shrank or (fresh == 1 and len(oracle.held) < before)
    assert shrank == (decode == "stream")


def test_within_a_budget_nothing_is_dropped_and_beyond_it_the_longest_forgotten() -> None:
    """The budget bounds it; within it the rule is not applied."""
    feeder = Feeder("scissorhands_percentile(history=50, recent=4, start=10)@30")
    feeder.step(25)
    assert feeder.layer.slots.count.tolist() == [[25, 25]]
    feeder.step(60)
    assert bool((feeder.layer.slots.count <= 30).all())
    for position in feeder.layer.slots.position[0]:
        assert position[-4:].tolist() == [81, 82, 83, 84]


def test_a_prompt_shorter_than_the_start_is_left_alone() -> None:
    """The released scripts prune from position 100 on."""
    feeder = Feeder("scissorhands_percentile()")
    feeder.step(99)
    assert feeder.layer.slots.count.tolist() == [[99, 99]]
    feeder.step(1)
    assert bool((feeder.layer.slots.count < 100).all())


def test_no_query_that_is_not_pruned_endorses_its_own_threshold() -> None:
    """Of ten keys a query endorses those above the tenth from below: none but the best."""
    tokens = 10
    query, keys = drawn(4, 1, 1, tokens)
    policy = ScissorhandsPercentile(start=0, history=1, recent=9)
    slots = Slots(1, 1, policy.columns, {}, CPU)
    slots.append(Step.plain(0, tokens), tokens)
    deque(endorse(policy.rule, slots, slots["endorsed"], query, keys, 1.0), maxlen=0)
    assert int((slots["endorsed"] == tokens).sum()) == 0
