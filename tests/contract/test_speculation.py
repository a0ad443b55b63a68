"""Speculative decoding: drafts that are rejected leave no trace, and what is gone stays gone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from tests.contract.recipes import LARGE_SHARES, SELECTIVE, SHARES, SMALL, WHOLE, fullest
from tests.support import Feeder, random_ids

ROUNDS = ((5, 3), (1, 0), (6, 0), (4, 3), (5, 4), (3, 1))  # tokens fed, of which rejected


def assert_same_state(one: Feeder, other: Feeder) -> None:
    """Same tokens, same votes, same counters."""
    assert torch.equal(one.layer.slots.position, other.layer.slots.position)
    assert torch.equal(one.layer.store.keys, other.layer.store.keys)
    for name in one.layer.policy.columns:
        ours, theirs = one.layer.slots[name].double(), other.layer.slots[name].double()
        assert torch.allclose(ours, theirs, atol=1e-5), name
    for name, counter in one.layer.slots.counters.items():
        assert torch.equal(counter, other.layer.slots.counters[name]), name


@pytest.mark.parametrize("recipe", [*SMALL, *LARGE_SHARES, *WHOLE])
@pytest.mark.parametrize("prompt", [20, 130])
def test_rejected_drafts_leave_no_trace(recipe: str, prompt: int) -> None:
    """As if only the accepted tokens of each round had been fed, in one step each."""
    drafting, plain = Feeder(recipe), Feeder(recipe)
    drafting.layer.activate_past_recording()
    drafting.step(prompt)
    plain.step(prompt)
    drafting.take_back(0)
    for _ in range(3):
        for fed, rejected in ROUNDS:
            drafting.step(fed)
            drafting.take_back(rejected)
            plain.step(fed - rejected)
            assert_same_state(drafting, plain)
    drafting.check()


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_prompt_lookup_keeps_to_the_budget(model: PreTrainedModel, recipe: str) -> None:
    ids = random_ids(1, 25).repeat(1, 4)
    cache = HiveCache.for_model(model, recipe)
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        prompt_lookup_num_tokens=4,
    )
    cache.end_recording()
    report = cache.report()
    assert out.shape[1] == 140
    assert report.tokens_seen == cache.get_seq_length() == 139
    policy, budget = cache.recipe.policy, cache.recipe.budget
    if budget is not None:
        # A share is taken anew whenever several tokens are accepted at once.
        most = policy.peak(budget.resolve(report.tokens_seen, policy.least_budget))
        grown = 0 if policy.acts(decoding=True) else report.tokens_seen - 100
        assert fullest(policy, report.kept) <= most + grown
    again = model.generate(out, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert again.shape[1] == 145


@pytest.mark.parametrize("recipe", SELECTIVE)
def test_nothing_is_evicted_while_recording(recipe: str) -> None:
    feeder = Feeder(recipe)
    feeder.step(30)
    feeder.layer.activate_past_recording()
    feeder.step(120)
    assert int(feeder.layer.slots.count.min()) == 150
    feeder.layer.end_recording()
    policy, budget = feeder.recipe.policy, feeder.recipe.budget
    assert budget is not None
    kept = feeder.layer.slots.count[None]
    assert fullest(policy, kept) <= policy.peak(budget.resolve(150, 1))
    assert not feeder.layer.record_past


@pytest.mark.parametrize("recipe", SELECTIVE)
def test_a_crop_behind_an_eviction_is_refused(recipe: str) -> None:
    feeder = Feeder(recipe)
    feeder.step(150)
    assert feeder.layer.evicted
    with pytest.raises(ValueError, match=r"crop.*(evicted|voted)"):
        feeder.layer.crop(-1)
    assert not feeder.layer.is_croppable
    feeder.layer.activate_past_recording()
    feeder.step(3)
    with pytest.raises(ValueError, match="only 3 were added since the last eviction"):
        feeder.layer.crop(-4)
    feeder.take_back(3)
    feeder.check()


@pytest.mark.parametrize("recipe", WHOLE)
def test_votes_cannot_be_taken_back(recipe: str) -> None:
    """Without recording, a crop is possible for policies that nobody votes in, and refused for
    others.
    """
    feeder = Feeder(recipe)
    feeder.step(20)
    if Recipe.parse(recipe).policy.needs.votes:
        assert not feeder.layer.is_croppable
        with pytest.raises(ValueError, match="voted already"):
            feeder.layer.crop(-1)
    else:
        assert feeder.layer.is_croppable
        feeder.take_back(2)
        feeder.step(1)
        assert feeder.layer.get_seq_length() == 19
        feeder.check()
    with pytest.raises(ValueError, match="expected minus the number"):
        feeder.layer.crop(1)
