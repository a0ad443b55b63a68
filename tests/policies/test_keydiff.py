"""KeyDiff against its definition: the keys least like the mean key stay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.policies.keydiff import KeyDiff
from kvhive.recipe import Recipe
from tests.support import Feeder

from ..conformance.playing import feed, make_layer


def random_keys(seed: int, *shape: int) -> Tensor:
    """float32 keys that lean to one side, as keys do."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source) + torch.randn(shape[-1], generator=source)


def length(vector: list[float]) -> float:
    """Euclidean."""
    return math.sqrt(sum(x * x for x in vector))


def distinctive(keys: Tensor, budget: int, anchor: str) -> list[int]:
    """Places to keep among one head's keys `[n, d]`, by the definition; ties: the older."""
    vectors: list[list[float]] = keys.double().tolist()
    units = [[x / length(v) for x in v] for v in vectors]
    mean = [
        sum(part) / len(vectors)
        for part in zip(*(units if anchor == "unit" else vectors), strict=True)
    ]
    likeness = [sum(x * m for x, m in zip(u, mean, strict=True)) / length(mean) for u in units]
    return sorted(sorted(range(len(units)), key=lambda p: (likeness[p], p))[:budget])


@pytest.mark.parametrize("anchor", ["unit", "plain"])
@pytest.mark.parametrize(("n", "budget"), [(9, 4), (50, 1), (50, 20), (80, 79)])
def test_a_prompt_keeps_the_most_distinctive(n: int, budget: int, anchor: str) -> None:
    keys = random_keys(n, 2, 3, n, 8)
    held = feed(make_layer(KeyDiff(anchor=anchor), budget), keys)
    for row in range(2):
        for head in range(3):
            assert held[row, head].tolist() == distinctive(keys[row, head], budget, anchor)


@pytest.mark.parametrize("anchor", ["unit", "plain"])
def test_the_mean_is_taken_anew_at_every_eviction(anchor: str) -> None:
    """Of what is held then: kept keys and new ones, in steps of any length."""
    keys = random_keys(5, 1, 2, 90, 8)
    layer = make_layer(KeyDiff(anchor=anchor), 16)
    held: list[list[int]] = [[], []]
    start = 0
    for fresh in (40, *[1] * 15, 20, *[1] * 15):
        now = feed(layer, keys[:, :, start : start + fresh])[0].tolist()
        for head in range(2):
            there = [*held[head], *range(start, start + fresh)]
            held[head] = [there[i] for i in distinctive(keys[0, head, there], 16, anchor)]
        start += fresh
        assert now == held


def test_slack_makes_it_work_in_blocks() -> None:
    """One eviction in every slack + 1 tokens, down to budget - slack."""
    feeder = Feeder("keydiff(slack=7)@32")
    feeder.step(60)
    sizes = []
    for _ in range(24):
        feeder.step(1)
        sizes.append(feeder.layer.slots.length)
    assert sizes == [*range(25, 33)] * 3


def test_least_like_the_mean_is_least_like_the_others() -> None:
    """With unit keys the score orders tokens as their mean cosine similarity to all keys does."""
    keys = random_keys(6, 60, 8)
    unit = F.normalize(keys.double(), dim=-1)
    to_all = (unit @ unit.T).mean(-1)
    best = to_all.sort(stable=True).indices[:15].sort().values
    assert feed(make_layer(KeyDiff(), 15), keys[None, None])[0, 0].tolist() == best.tolist()


def test_lengths_count_only_in_a_plain_mean() -> None:
    """One very long key draws the plain mean to itself, and so becomes the least distinctive."""
    keys = random_keys(7, 1, 1, 30, 8)
    away = keys.clone()
    away[..., 4, :] = -keys.mean(2)
    far = away.clone()
    far[..., 4, :] *= 1000
    for cloud in (away, far):
        assert 4 in feed(make_layer(KeyDiff(), 3), cloud)[0, 0].tolist()
    assert 4 not in feed(make_layer(KeyDiff(anchor="plain"), 3), far)[0, 0].tolist()


def test_a_cluster_gives_way_to_what_stands_apart() -> None:
    """Forty nearly equal keys and three others: the three stay."""
    keys = torch.ones(1, 1, 43, 6) + 0.01 * random_keys(8, 1, 1, 43, 6)
    for place, axis in ((3, 0), (20, 1), (41, 2)):
        keys[0, 0, place] = -torch.eye(6)[axis]
    held = feed(make_layer(KeyDiff(), 5), keys)[0, 0].tolist()
    assert {3, 20, 41} <= set(held)


@pytest.mark.parametrize("knobs", ["anchor=middle", "anchor=3"])
def test_bad_knobs(knobs: str) -> None:
    """In a recipe."""
    with pytest.raises(ValueError, match="keydiff: anchor must be 'unit' or 'plain', got"):
        Recipe.parse(f"keydiff({knobs})@20")
