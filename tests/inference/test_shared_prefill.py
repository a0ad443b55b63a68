"""Shared work must give what each recipe gives alone, but for the rounding of float32 softmaxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.teacher_forcing import attended_by
from kvhive.inference.driver import Driver
from kvhive.inference.shared_prefill import SharedPrefill, SharedStep, reads_like_others
from kvhive.policies import POLICIES
from tests.support import random_ids, tiny, tiny_llama

RECIPES = ["full", "h2o@40", "streaming_llm@30", "buzz(variant=fast)@50", "window@20"]


def every_recipe() -> list[str]:
    """Each registered policy in some form that runs on a short prompt."""
    forms = []
    for name, policy in POLICIES.items():
        sizing = policy().sizing
        if not sizing.budgeted or sizing.implied is not None or sizing.alone is not None:
            forms.append(name)
        else:
            forms.append(f"{name}@{max(48, sizing.least + 8)}")
    return forms


@torch.no_grad()
def read_alone(model: PreTrainedModel, recipe: str, ids: Tensor) -> tuple[HiveCache, Tensor]:
    cache = HiveCache.for_model(model, recipe)
    return cache, model(ids, past_key_values=cache).logits


@torch.no_grad()
def read_together(model: PreTrainedModel, recipes: list[str], ids: Tensor) -> list[HiveCache]:
    caches = [HiveCache.for_model(model, recipe) for recipe in recipes]
    model(ids, past_key_values=SharedPrefill(caches))
    return caches


def same(one: HiveCache, other: HiveCache) -> None:
    """The same tokens, keys, values and scores."""
    pairs = zip(one.hive_layers(), other.hive_layers(), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.slots.position, theirs.slots.position)
        for mine, its in zip(ours.store.view(), theirs.store.view(), strict=True):
            assert torch.allclose(mine, its, atol=1e-4)
        for name in ours.policy.columns:
            left, right = ours.slots[name].double(), theirs.slots[name].double()
            assert torch.allclose(left, right, rtol=1e-4, atol=1e-4), name
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.nbytes == theirs.nbytes
    assert one.report().full_nbytes == other.report().full_nbytes


def test_one_pass_gives_every_policy_what_its_own_gives():
    model, ids = tiny_llama(), random_ids(1, 150)
    recipes = every_recipe()
    for recipe, shared in zip(recipes, read_together(model, recipes, ids), strict=True):
        own, _ = read_alone(model, recipe, ids)
        same(shared, own)


def test_caches_that_shared_a_prompt_do_not_share_memory():
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 40)
    first, second = read_together(model, ["full", "h2o@100"], ids)
    before = second.hive_layers()[0].store.keys.clone()
    first.hive_layers()[0].store.keys.zero_()
    assert torch.equal(second.hive_layers()[0].store.keys, before)


@pytest.mark.parametrize("size", [1, 5])
def test_a_shared_step_gives_what_each_cache_gives_alone(size):
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 90)
    more = random_ids(1, 25, seed=1)
    caches = read_together(model, RECIPES, ids)
    alone = [read_alone(model, recipe, ids)[0] for recipe in RECIPES]
    for start in range(0, 25, size):
        step = more[:, start : start + size]
        with torch.no_grad():
            shared = SharedStep(caches, [1] * len(caches))
            together = model(step.expand(len(caches), -1), past_key_values=shared).logits
            for place, cache in enumerate(alone):
                own = model(step, past_key_values=cache).logits[0]
                assert torch.allclose(together[place], own, atol=1e-4)
    for shared, own in zip(caches, alone, strict=True):
        same(shared, own)


def test_caches_may_have_several_rows_each():
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 60)
    caches = read_together(model, ["full", "h2o@30"], ids)
    copies = [caches[0].fork(), caches[1].fork()]
    copies[1].batch_repeat_interleave(3)
    step = random_ids(4, 1, seed=2)
    with torch.no_grad():
        together = model(step, past_key_values=SharedStep(copies, [1, 3])).logits
        for row, cache in enumerate([caches[0], *[caches[1]] * 3]):
            own = model(step[row : row + 1], past_key_values=cache.fork()).logits[0]
            assert torch.allclose(together[row], own, atol=1e-4)


def test_sliding_layers_of_a_hybrid_model_join_in():
    kinds = ["sliding_attention", "full_attention"]
    model = tiny("gemma3_text", head_dim=8, sliding_window=16, layer_types=kinds).double()
    ids, more = random_ids(1, 50), random_ids(1, 6, seed=1)
    recipes = ["full", "h2o@20"]
    assert all(reads_like_others(HiveCache.for_model(model, recipe)) for recipe in recipes)
    caches = read_together(model, recipes, ids)
    alone = [read_alone(model, recipe, ids)[0] for recipe in recipes]
    for token in more.split(1, dim=1):
        with torch.no_grad():
            together = model(token.expand(2, -1), past_key_values=SharedStep(caches, [1, 1])).logits
            for place, cache in enumerate(alone):
                own = model(token, past_key_values=cache).logits[0]
                assert torch.allclose(together[place], own, atol=1e-4)


def test_attention_on_what_is_held():
    """A window's share of attention, against the full cache's probabilities worked out by hand."""
    model = tiny_llama(dtype=torch.float64)
    ids, scored = random_ids(1, 60), tuple(random_ids(8, seed=3).tolist())
    caches = read_together(model, ["full", "window@20"], ids)
    full, window = attended_by(Driver(model), caches, scored)
    assert full.mass == pytest.approx(1)
    assert full.error == 0
    eager = tiny_llama(dtype=torch.float64)
    eager.set_attn_implementation("eager")
    whole = torch.cat([ids, torch.tensor([scored])], dim=1)
    with torch.no_grad():
        weights = eager(whole, output_attentions=True).attentions
    kept = [
        layer[0, :, -8:, 40:].sum(-1).mean(-1).view(2, 2).mean(-1) for layer in weights
    ]  # query heads of a KV head together
    shares = torch.stack(kept)
    assert window.mass == pytest.approx(float(shares.mean()), abs=1e-6)
    assert window.least_mass == pytest.approx(float(shares.min()), abs=1e-6)
    assert window.error > 0.01
