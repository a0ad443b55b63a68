"""Elastic Cache against a slow oracle: anchors, merging, and the fixed slot while generating."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kvhive.policies.elastic import Elastic
from kvhive.recipe import Recipe
from tests.policies.rig import NOTHING_TO_SCORE, Rig, kept, small_numbers
from tests.support import Feeder


def slow_instruction(
    score: list[float], start: int, budget: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Positions kept of a prompt, and for each anchor those folded into it."""
    length = len(score)
    candidates = list(range(start, length - 1))
    ranked = sorted(candidates, key=lambda p: (score[p], p))
    dropped = sorted(ranked[: length - budget])
    anchors = [p for p in candidates if p not in dropped]
    groups: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for token in dropped:
        groups[min(anchors, key=lambda a: (abs(a - token), a))].append(token)
    return [*range(start), *anchors, length - 1], groups


def after_prompt(recipe: str, prompt: int, tapes: tuple[int, ...] = (0,)) -> Feeder:
    """A layer that has read one prompt."""
    feeder = Feeder(recipe, tapes)
    feeder.step(prompt)
    return feeder


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize(("prompt", "budget"), [(9, 8), (9, 6), (40, 39), (40, 20), (41, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_anchors_and_targets_are_the_oracles(
    prompt: int, budget: int, start: int, heads: int, seed: int
) -> None:
    """With whole numbers for attention, so that ties abound."""
    received = small_numbers(seed, 1, heads, prompt)
    policy = Elastic(start=start)
    rig = Rig(policy, None, received)
    rig.budget = prompt
    rig.step(prompt)
    limit = torch.full((1, heads), budget)
    choice = policy.choose(rig.slots, limit, policy.score(rig.slots, NOTHING_TO_SCORE))
    keep, into = choice.keep, choice.into
    stay, groups = slow_instruction(received[0].sum(0).tolist(), start, budget)
    assert into is not None
    for head in range(heads):
        assert keep[0, head].nonzero().flatten().tolist() == stay
        targets = {p: t for p, t in enumerate(into[0, head].tolist()) if t >= 0}
        assert targets == {token: a for a, group in groups.items() for token in group}
    assert choice.counters["fixed"].unique().tolist() == [budget - 25]
    assert rig.slots.counters["fixed"].unique().tolist() == [prompt - 25], (
        "choosing changes nothing"
    )


def test_heads_can_be_exchanged() -> None:
    """One ranking for the layer: the order of its heads does not matter."""
    received = torch.rand(1, 4, 60, generator=torch.Generator().manual_seed(1))
    one, other = Rig(Elastic(), 20, received), Rig(Elastic(), 20, received[:, [2, 0, 3, 1]])
    one.step(60)
    other.step(60)
    assert one.positions == other.positions
    assert one.positions[0] == one.positions[3]


@pytest.mark.parametrize("recipe", ["elastic(start=3)@40", "elastic(start=3, drop_ratio=0.7)"])
def test_nothing_is_lost_in_merging(recipe: str) -> None:
    """Group size times mean, over all anchors, is the sum of all there was; ends are untouched."""
    feeder = after_prompt(recipe, 130)
    slots, store = feeder.layer.slots, feeder.layer.store
    count = slots.length
    assert count == 40  # 130 * (1 - 0.7) is a little more than 39 in double precision
    for head in range(feeder.kv_heads):
        held = slots.position[0, head].tolist()
        anchors = held[3:-1]
        size = dict.fromkeys(anchors, 1)
        for token in sorted(set(range(130)) - set(held)):
            size[min(anchors, key=lambda a, t=token: (abs(a - t), a))] += 1
        weight = torch.tensor([float(size[anchor]) for anchor in anchors])
        for held_rows, written in ((store.keys, feeder.keys), (store.values, feeder.values)):
            total = (held_rows[0, head, 3:-1] * weight[:, None]).sum(0)
            torch.testing.assert_close(total, written[0, head, 3:129].sum(0), atol=1e-4, rtol=1e-4)
            ends = [0, 1, 2, count - 1]
            assert torch.equal(held_rows[0, head, ends], written[0, head, [0, 1, 2, 129]])


def test_without_merging_the_same_tokens_stay_as_they_were() -> None:
    merged, plain = after_prompt("elastic@30", 100), after_prompt("elastic(merge=false)@30", 100)
    assert torch.equal(merged.layer.slots.position, plain.layer.slots.position)
    plain.check()
    assert not torch.equal(merged.layer.store.keys, plain.layer.store.keys)


def test_merged_rows_of_a_padded_batch_are_as_alone() -> None:
    """Left padding is neither anchor nor target."""
    together = Feeder("elastic@30", tapes=(0, 1, 2))
    together.step([90, 33, 17])
    for row, length in enumerate((90, 33, 17)):
        alone = after_prompt("elastic@30", length, (row,))
        held = together.layer.slots.valid[row]
        pairs = zip(together.layer.store.view(), alone.layer.store.view(), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[row][held], theirs[0].flatten(0, 1))


@pytest.mark.parametrize(
    ("recipe", "fixed"),
    [
        ("elastic(slack=0)@60", 35),
        ("elastic(slack=0, distance=-8)@60", 52),
        ("elastic(slack=0, distance=12)@60", 12),
        ("elastic(slack=0, distance=-70)@60", 1),
        ("elastic(slack=0, distance=500)@60", 59),
        ("elastic(start=5, slack=0, distance=2)@60", 5),
        ("elastic(drop_ratio=0.5, distance=-10)", 40),
    ],
)
def test_the_fixed_slot_goes_and_nothing_else(recipe: str, fixed: int) -> None:
    """At most one slot a step, always the same, clamped between the first tokens and the newest."""
    feeder = after_prompt(recipe, 100)
    held = feeder.layer.slots.position[0].tolist()
    for seen in range(100, 160):
        feeder.step(1)
        grown = [[*head, seen] for head in held]
        now = feeder.layer.slots.position[0].tolist()
        if len(now[0]) == len(grown[0]):
            assert now == grown
        else:
            assert now == [head[:fixed] + head[fixed + 1 :] for head in grown]
        held = now
    if "@" in recipe:
        assert len(held[0]) == 60
    else:
        assert len(held[0]) == 80


def test_a_prompt_within_budget_still_fixes_the_slot() -> None:
    """F follows the end of the prompt, although nothing of it was dropped."""
    feeder = after_prompt("elastic(slack=0)@60", 50)
    for _ in range(30):
        feeder.step(1)
    assert feeder.layer.slots.position[0, 0].tolist() == [*range(25), *range(45, 80)]


def test_a_stream_without_prompt_is_first_tokens_and_window() -> None:
    feeder = Feeder("elastic(start=3, slack=0)@20")
    for _ in range(50):
        feeder.step(1)
    assert feeder.layer.slots.position[0, 0].tolist() == [0, 1, 2, *range(33, 50)]


def test_slack_frees_several_slots_from_the_fixed_one_on() -> None:
    feeder = after_prompt("elastic(slack=4)@60", 100)
    held = feeder.layer.slots.position[0, 0].tolist()
    feeder.step(1)
    expected = [*held, 100][:35] + [*held, 100][40:]
    assert feeder.layer.slots.position[0, 0].tolist() == expected


def test_making_room_while_generating_drops_and_does_not_merge() -> None:
    feeder = after_prompt("elastic(slack=0, merge=false)@60", 100)
    feeder.step(1)
    held = feeder.layer.slots.position[0, 0].tolist()
    feeder.layer.make_room(30)
    # from slot F = 35 on there are 24 to take before the newest, the other 6 are those before it
    assert feeder.layer.slots.position[0, 0].tolist() == [*held[:29], held[-1]]
    feeder.check()


def test_a_second_turn_merges_anew() -> None:
    """It is an instruction again: ranked by all votes of instructions, F follows its end."""
    feeder = after_prompt("elastic(slack=0)@60", 100)
    for _ in range(10):
        feeder.step(1)
    before = feeder.layer.slots.position[0, 0].tolist()
    feeder.step(20)
    after = feeder.layer.slots.position[0, 0].tolist()
    assert len(after) == 60
    assert after[0] == 0
    assert after[-1] == 129
    assert set(after) <= {*before, *range(110, 130)}
    assert not set(range(110, 129)) <= set(after), (
        "new tokens that nobody attends to are merged too"
    )
    assert feeder.layer.slots.counters["fixed"].unique().tolist() == [35]


@pytest.mark.parametrize("drop_ratio", [0.0, 0.1, 0.15, 0.2, 1 / 3, 0.5, 0.8, 0.9, 0.99])
def test_the_ratio_rule_is_evaluated_as_written(drop_ratio: float) -> None:
    """int(len - T * (1 - r)) == 1 decides, in double precision and in this order."""
    policy = Elastic(start=0, drop_ratio=drop_ratio)
    held = None
    for seen in range(1, 700):
        held = seen if held is None else held + 1
        surplus = max(0, int(held - seen * (1 - drop_ratio)))
        held = max(held - surplus, min(held, policy.sizing.least))
        limit = policy.sizing.alone(seen)
        assert limit is not None
        assert held == min(seen, limit)


def test_tiny_prompts_keep_an_anchor() -> None:
    """However much is to be dropped: first tokens, one anchor, last token."""
    for prompt in range(1, 8):
        feeder = after_prompt("elastic(start=2, drop_ratio=0.99)", prompt)
        count = feeder.layer.slots.length
        assert count == min(prompt, 4)
    assert feeder.layer.slots.position[0, 0, [0, 1, 3]].tolist() == [0, 1, 6]
    everything = torch.stack([feeder.keys[0, head, 2:6].mean(0) for head in range(2)])
    torch.testing.assert_close(feeder.layer.store.keys[0, :, 2], everything)


def test_the_cache_grows_at_the_rate_kept() -> None:
    feeder = after_prompt("elastic(drop_ratio=0.75)", 200)
    sizes = [feeder.layer.slots.length]
    for _ in range(100):
        feeder.step(1)
        sizes.append(feeder.layer.slots.length)
    assert sizes[0] == 50
    assert sizes[-1] == 75
    assert {later - sooner for sooner, later in pairwise(sizes)} == {0, 1}


def test_heads_with_budgets_of_their_own_share_the_ranking() -> None:
    """Then a token is found in each head by its position."""
    policy = Elastic(start=1)
    received = torch.rand(2, 2, 80, generator=torch.Generator().manual_seed(3))
    rig = Rig(policy, 80, received)
    rig.step(60)
    score = received[0].sum(0)

    def cut(first: int, second: int) -> list[list[int]]:
        keep = kept(policy, rig.slots, torch.tensor([[first, second]]))
        return [rig.slots.position[0, head][keep[0, head]].tolist() for head in range(2)]

    small, large = cut(10, 30)
    assert set(small) <= set(large)
    assert small == sorted([0, 59, *(score[1:59].topk(8).indices + 1).tolist()])


def test_knobs_are_checked() -> None:
    for knobs, message in (
        ({"start": -1}, "elastic: start must be at least 0, got -1"),
        ({"drop_ratio": 1.0}, r"elastic: drop_ratio must lie in \[0, 1\), got 1.0"),
        ({"drop_ratio": -0.1}, r"elastic: drop_ratio must lie in \[0, 1\), got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            Elastic(**knobs)
    with pytest.raises(ValueError, match="elastic needs a budget"):
        Recipe.parse("elastic")
    with pytest.raises(ValueError, match="elastic takes no budget"):
        Recipe.parse("elastic(drop_ratio=0.5)@0.5")
    with pytest.raises(ValueError, match="below 6"):
        Recipe.parse("elastic(start=4)@5")
    assert math.isclose(Recipe.parse("elastic(drop_ratio=0.2)").policy.drop_ratio, 0.2)
