"""Speculative decoding: drafts that are rejected leave no trace, and what is gone stays gone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.speculation import crop
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


@pytest.mark.parametrize("recipe", [*SMALL, *LARGE_SHARES, *WHOLE, *SHARES])
@pytest.mark.parametrize("prompt", [20, 130])
@pytest.mark.parametrize("draft", [0, 3])
def test_speculation_keeps_what_plain_decoding_keeps(recipe: str, prompt: int, draft: int) -> None:
    """As if only the accepted tokens had been fed, one by one. draft: rejected tokens that came
    together with the prompt.
    """
    drafting, plain = Feeder(recipe), Feeder(recipe)
    drafting.layer.activate_past_recording()
    drafting.step(prompt + draft)
    plain.step(prompt)
    drafting.take_back(draft)
    for _ in range(3):
        for fed, rejected in ROUNDS:
            drafting.step(fed)
            drafting.take_back(rejected)
            for _ in range(fed - rejected):
                plain.step(1)
            assert_same_state(drafting, plain)
    drafting.check()


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_single_drafts_are_decoded_tokens(recipe: str) -> None:
    """An assistant model drafts token by token, and takes some of them back."""
    drafting, plain = Feeder(recipe), Feeder(recipe)
    drafting.layer.activate_past_recording()
    for feeder in (drafting, plain):
        feeder.step(130)
    for _ in range(12):
        for _ in range(5):
            drafting.step(1)
        drafting.take_back(2)
        for _ in range(3):
            plain.step(1)
    assert_same_state(drafting, plain)


@pytest.mark.parametrize("recipe", ["streaming_llm@70", "full", "l2norm@70"])
def test_nobody_who_does_not_vote_is_recorded(recipe: str) -> None:
    """A prompt is not held twice, nor its queries, for policies that look at no attention."""
    recorded, plain = Feeder(recipe), Feeder("full")
    recorded.layer.activate_past_recording()
    for feeder in (recorded, plain):
        feeder.step(600)
    assert recorded.layer.nbytes <= 1.1 * plain.layer.nbytes
    recorded.take_back(0)
    assert not recorded.layer.pending


def test_generation_with_drafts_keeps_the_plain_recipe(model: PreTrainedModel) -> None:
    """The reviewer's cases: a share is that of the prompt, and prompts alone are compressed."""
    ids = random_ids(1, 60).repeat(1, 5)
    for recipe in ("streaming_llm(slack=0)@0.4", "l2norm(decode=none)@100"):
        kept = {}
        for lookup in (None, 4):
            cache = HiveCache.for_model(model, recipe)
            more = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
            model.generate(ids, past_key_values=cache, max_new_tokens=150, do_sample=False, **more)
            cache.end_recording()
            kept[lookup] = cache.report().tokens_kept
        # what is accepted of the first draft counts as prompt: it comes together with it
        assert abs(kept[4] - kept[None]) <= 4


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
        # Of the first draft, what was accepted counts as prompt.
        most = policy.sizing.peak(budget.resolve(100 + 4, policy.sizing.least))
        grown = 0 if policy.sizing.decoding else report.tokens_seen - 100
        assert fullest(recipe, report.kept) <= most + grown
    again = model.generate(out, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert again.shape[1] == 145


@pytest.mark.parametrize("recipe", SELECTIVE)
def test_nothing_is_evicted_while_recording(recipe: str) -> None:
    feeder = Feeder(recipe)
    feeder.step(30)
    feeder.layer.activate_past_recording()
    feeder.step(120)
    assert int(feeder.layer.slots.count.min()) == 150
    crop([feeder.layer], 0)
    feeder.layer.record_past = False
    policy, budget = feeder.recipe.policy, feeder.recipe.budget
    assert budget is not None
    kept = feeder.layer.slots.count[None]
    assert fullest(recipe, kept) <= policy.sizing.peak(budget.resolve(150, 1))
    feeder.step(1)
    feeder.check()


@pytest.mark.parametrize("recipe", SELECTIVE)
def test_a_crop_behind_an_eviction_is_refused(recipe: str) -> None:
    feeder = Feeder(recipe)
    feeder.step(150)
    assert feeder.layer.evicted
    with pytest.raises(ValueError, match=r"crop.*(evicted|voted)"):
        crop([feeder.layer], 1)
    assert not feeder.layer.is_croppable
    feeder.layer.activate_past_recording()
    feeder.step(3)
    with pytest.raises(ValueError, match="only 3 were added since the last eviction"):
        crop([feeder.layer], 4)
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
            crop([feeder.layer], 1)
    else:
        assert feeder.layer.is_croppable
        feeder.take_back(2)
        feeder.step(1)
        assert feeder.layer.get_seq_length() == 19
        feeder.check()
    with pytest.raises(ValueError, match="expected minus the number"):
        crop([feeder.layer], -1)
