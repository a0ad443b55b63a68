"""Queries that vote together, some tokens late: the same scores, the same survivors, few bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvhive.cache.late_votes import FEW
from kvhive.kernels import TOGETHER
from kvhive.policies import POLICIES
from tests.support import Feeder

RECIPES = (
    "h2o@600",
    "buzz@600",
    "buzz_log@600",
    "tova@600",
    "corm@600",
    "scissorhands(history=40)@600",
    "cascading(reduce=mean)@600",
)


def at_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> Feeder:
    """A layer in which every query votes as soon as it has attended."""
    feeder = Feeder(recipe)
    policy = feeder.layer.policy
    needs = replace(policy.needs, together=1)
    monkeypatch.setattr(type(policy), "needs", property(lambda self: needs))
    return feeder


@pytest.mark.parametrize("recipe", RECIPES)
def test_late_votes_are_the_same_votes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late, waited = Feeder(recipe), 0
    assert late.layer.policy.needs.together == TOGETHER
    kept = []
    for count in (580, *[1] * 150, 12, *[1] * 60):
        late.step(count)
        waited = max(waited, len(late.layer.late))
        assert len(late.layer.late) <= late.layer.slots.length // FEW
        kept.append(late.layer.slots.position.clone())
    assert waited > 4, "nobody waited"
    late.check()
    with monkeypatch.context() as patch:
        eager = at_once(recipe, patch)
        for count, expected in zip((580, *[1] * 150, 12, *[1] * 60), kept, strict=True):
            eager.step(count)
            assert not eager.layer.late
            assert torch.equal(eager.layer.slots.position, expected)
        for name in eager.layer.policy.columns:
            ours, theirs = late.layer.slots[name].double(), eager.layer.slots[name].double()
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), name


def test_whoever_looks_finds_all_votes() -> None:
    """Columns are up to date whenever they are read; so is a copy, and a row moved elsewhere."""
    feeder = Feeder("h2o@1000")
    feeder.step(600)
    for _ in range(5):
        feeder.step(1)
    layer = feeder.layer
    assert len(layer.late) == 5
    total = float(layer.slots["score"].sum())
    assert total == pytest.approx(605 * feeder.heads, rel=1e-4)
    assert not layer.late
    feeder.step(1)
    layer.reorder_cache(torch.tensor([0, 0]))
    assert not layer.late
    assert layer.slots["score"].shape[0] == 2


def test_what_waits_is_counted() -> None:
    feeder = Feeder("h2o@1000")
    feeder.step(600)
    feeder.step(1)
    query = feeder.heads * feeder.width * 4
    rest = feeder.layer.store.nbytes + feeder.layer.slots.nbytes
    assert feeder.layer.nbytes == rest + query


@pytest.mark.parametrize("name", POLICIES)
def test_only_those_who_vote_ask_to_wait(name: str) -> None:
    needs = POLICIES[name]().needs
    assert needs.attention or needs.together == 1
