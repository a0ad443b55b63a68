"""SnapKV against an oracle in plain Python: votes of the window, reduced, smoothed, best kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.kernels import Ask, reference
from kvhive.policies.snapkv import SnapKV
from kvhive.step import Step
from tests.support import Feeder

from ..conformance.playing import feed, make_layer
from .dense import check_dense_decoding
from .rig import NOTHING_TO_SCORE
from .rows import RowRig, random_logits, random_steps

HEADS, GROUP, TOKENS = 2, 3, 120
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda votes: sum(votes) / len(votes),
    "max": max,
    "sum": sum,
}
Votes = list[dict[int, float]]


class SlowSnapKV:
    """One KV head: positions held and the votes of its query heads, in two blocks of queries."""

    def __init__(self, policy: SnapKV, budget: int) -> None:
        self.policy, self.budget = policy, budget
        self.held: list[int] = []
        self.now: Votes = [{} for _ in range(GROUP)]
        self.before: Votes = [{} for _ in range(GROUP)]
        self.voters = 0

    def step(self, fresh: int, rows: list[dict[int, dict[int, float]]]) -> None:
        """Append, count the last queries of the step, and evict if there are too many tokens."""
        newest = max(rows[0])
        self.held += range(newest + 1 - fresh, newest + 1)
        window = self.policy.window
        queries = range(newest + 1 - min(fresh, window), newest + 1)
        if self.voters + len(queries) > window:
            self.before, self.now, self.voters = self.now, [{} for _ in range(GROUP)], 0
        self.voters += len(queries)
        for head in range(GROUP):
            for p in self.held:
                given = sum(rows[head][query][p] for query in queries)
                self.now[head][p] = self.now[head].get(p, 0.0) + given
        if len(self.held) > self.budget:
            self.evict()

    def evict(self) -> None:
        """Keep the window and the best-scored of the others; ties: the older."""
        past, window = self.held[: -self.policy.window], self.held[-self.policy.window :]
        weight = 1 - self.voters / self.policy.window
        votes = [
            REDUCE[self.policy.group_reduce](
                [
                    now[p] + weight * before.get(p, 0.0)
                    for now, before in zip(self.now, self.before, strict=True)
                ]
            )
            for p in past
        ]
        score = dict(zip(past, self.smooth(votes), strict=True))
        best = sorted(past, key=lambda p: (-score[p], p))[: self.budget - len(window)]
        self.held = sorted(best) + window

    def smooth(self, votes: list[float]) -> list[float]:
        """Mean or maximum of `kernel` neighbours; beyond the ends lie zeros."""
        half = self.policy.kernel // 2
        wide = [0.0] * half + votes + [0.0] * half
        runs = [wide[i : i + self.policy.kernel] for i in range(len(votes))]
        if self.policy.pooling == "max":
            return [max(run) for run in runs]
        return [sum(run) / self.policy.kernel for run in runs]


POLICIES = [
    SnapKV(window=8),
    SnapKV(window=8, kernel=7, pooling="max"),
    SnapKV(window=1, kernel=1),
    SnapKV(window=5, kernel=3, group_reduce="max"),
    SnapKV(window=6, kernel=5, pooling="max", group_reduce="max"),
    SnapKV(window=6, kernel=9, group_reduce="sum"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("seed", "budget"), [(0, 12), (1, 30), (2, 300)])
def test_decisions_are_the_oracles(policy: SnapKV, seed: int, budget: int) -> None:
    """Prompts, chunks and single tokens: the same tokens in every head after every step."""
    rig = RowRig(policy, budget, random_logits(seed, HEADS * GROUP, TOKENS), HEADS)
    slow = [SlowSnapKV(policy, budget) for _ in range(HEADS)]
    for fresh in random_steps(seed, TOKENS, 50):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.rows[head * GROUP : (head + 1) * GROUP])
            assert rig.positions[head] == oracle.held
            assert len(oracle.held) == min(rig.seen, budget)
            assert oracle.held[-policy.window :] == list(
                range(max(0, rig.seen - policy.window), rig.seen)
            )


def test_votes_are_rows_of_the_whole_matrix() -> None:
    """What the last queries of a prompt give, from the kernel and from all of the attention."""
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(1, HEADS, 90, 8, generator=source)
    queries = torch.randn(1, HEADS * GROUP, 90, 8, generator=source)
    policy = SnapKV(window=16)
    layer = make_layer(policy, 100)
    feed(layer, keys, queries)
    whole = SnapKV(window=90).needs
    _, seen = reference.attend(queries, keys, keys, Ask(Step.plain(0, 90), 8**-0.5, whole))
    assert seen.rows is not None
    votes = seen.rows.all()[:, :, -16:].sum(2).view(1, HEADS, GROUP, 90).mean(2)
    assert torch.allclose(layer.slots["votes"], votes, atol=1e-5)


def test_a_token_brings_its_neighbours_along() -> None:
    """One strong vote, smoothed by a maximum over five: two tokens on either side come with it."""
    logits = torch.zeros(1, 40, 40)
    logits[:, :, 17] = 8.0
    rig = RowRig(SnapKV(window=4, kernel=5, pooling="max"), 9, logits, 1)
    rig.step(40)
    assert rig.positions == [[15, 16, 17, 18, 19, 36, 37, 38, 39]]


def test_plateaus_keep_their_older_end() -> None:
    """Equal scores at the cut: lower positions win."""
    logits = torch.zeros(1, 40, 40)
    logits[:, :, 17] = 8.0
    rig = RowRig(SnapKV(window=4, kernel=7, pooling="max"), 8, logits, 1)
    rig.step(40)
    assert rig.positions == [[14, 15, 16, 17, 36, 37, 38, 39]]


def test_the_maximum_is_taken_of_sums() -> None:
    """Two heads that each like a token all the time beat a token that each head likes in turn."""
    logits = torch.zeros(2, 20, 20)
    logits[0, :, 3] = 3.0
    logits[1, :, 5] = 2.9
    for query in range(20):
        logits[query % 2, query, 9] = 3.6
    held = {}
    for reduce in ("max", "mean"):
        rig = RowRig(SnapKV(window=4, kernel=1, group_reduce=reduce), 5, logits, 1)
        rig.step(20)
        held[reduce] = rig.positions[0][0]
    assert held == {"max": 3, "mean": 9}


@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
def test_a_group_of_like_heads_is_as_one_head(group_reduce: str) -> None:
    """So with one query head a KV head nothing depends on the reduction."""
    logits = random_logits(5, HEADS, TOKENS)
    alone = RowRig(SnapKV(window=8), 20, logits, HEADS)
    group = RowRig(
        SnapKV(window=8, group_reduce=group_reduce), 20, logits.repeat_interleave(4, 0), HEADS
    )
    for fresh in (60, *[1] * 40):
        alone.step(fresh)
        group.step(fresh)
        assert alone.positions == group.positions


def test_votes_of_the_window_only() -> None:
    """What was liked long ago is forgotten: after two windows of other queries it has no vote."""
    logits = torch.zeros(1, 80, 80)
    logits[:, :40, 5] = 9.0
    logits[:, 40:, 11] = 9.0
    rig = RowRig(SnapKV(window=8, kernel=1), 60, logits, 1)
    rig.step(40)
    assert float(rig.slots["votes"][0, 0, 5]) > 7
    for _ in range(17):
        rig.step(1)
    scores = rig.policy.score(rig.slots, NOTHING_TO_SCORE)
    assert scores is not None
    score = scores[0, 0]
    assert float(score[5]) < 0.1
    assert float(score[11]) > 7


@pytest.mark.parametrize("group_reduce", ["mean", "max"])
def test_rows_of_a_padded_batch_vote_for_themselves(group_reduce: str) -> None:
    """Padded prompts and turns, a row that says nothing for a while: as alone."""
    recipe = f"snapkv(window=8, group_reduce={group_reduce}, pooling=max)@24"
    batch = Feeder(recipe, tapes=(0, 1, 2))
    singles = [Feeder(recipe, tapes=(row,)) for row in range(3)]
    steps = [(60, 31, 5), *[(1, 1, 1)] * 30, (3, 20, 6), (12, 0, 4), *[(1, 1, 1)] * 20]
    for step in steps:
        batch.step(step)
        for row, single in enumerate(singles):
            if step[row]:
                single.step(step[row])
            held = single.layer.slots.position[0].tolist()
            ours = batch.layer.slots.position[row].tolist()
            assert [[p for p in head if p >= 0] for head in ours] == held


def test_a_prompt_only_form() -> None:
    """As in the paper: nothing goes while decoding."""
    feeder = Feeder("snapkv(decode=none, window=8)@20")
    feeder.step(50)
    for decoded in range(1, 30):
        feeder.step(1)
        assert feeder.layer.slots.length == 20 + decoded


def test_answers_are_dense_attention_over_the_kept(
    model: PreTrainedModel, stock: PreTrainedModel
) -> None:
    check_dense_decoding(model, stock, "snapkv(decode=none, window=8)@25")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": 0}, "snapkv: window must be at least 1, got 0"),
        ({"kernel": 4}, "snapkv: kernel must be an odd number, got 4"),
        ({"kernel": -1}, "snapkv: kernel must be an odd number, got -1"),
    ],
)
def test_bad_knobs(knobs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**knobs)  # type: ignore[arg-type]
