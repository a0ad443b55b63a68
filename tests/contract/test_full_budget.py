"""With room for everything, every policy gives what the full cache gives, however one decodes."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.budget import FLOOR
from kvhive.cache.hive_cache import HiveCache
from tests.contract.recipes import SHARES, WHOLE
from tests.support import divergence, left_padded, random_ids, read, stock_logits, tiny_llama

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PROMPT, TOTAL = 60, 72


@pytest.fixture(scope="module", params=list(TOLERANCE), ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model to attach to and its stock twin, in each dtype."""
    return tiny_llama(dtype=request.param), tiny_llama(dtype=request.param)


@pytest.mark.parametrize("recipe", WHOLE)
def test_outputs_equal_the_full_cache(
    pair: tuple[PreTrainedModel, PreTrainedModel], recipe: str
) -> None:
    ours, stock = pair
    ids = random_ids(2, TOTAL)
    expected = stock_logits(stock, ids, PROMPT)
    logits = read(ours, HiveCache.for_model(ours, recipe), ids, PROMPT)
    error = (logits.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[ours.dtype]


@pytest.mark.parametrize("recipe", WHOLE)
def test_bitwise_equal_to_full_where_the_kernel_is_the_same(
    model: PreTrainedModel, recipe: str
) -> None:
    """A policy that asks for no probabilities reads and decodes as `full` does, others nearly so;
    all of those decode alike.
    """
    cache = HiveCache.for_model(model, recipe)
    votes = cache.recipe.policy.needs.attention
    same, prompt = ("h2o@100000", 1) if votes else ("full", PROMPT)
    ids = random_ids(2, TOTAL if prompt == PROMPT else 20)
    expected = read(model, HiveCache.for_model(model, same), ids, prompt)
    assert torch.equal(read(model, cache, ids, prompt), expected)


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("chunk", [7, 59])
def test_chunked_prefill_equals_a_whole_one(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, chunk: int
) -> None:
    rows = [random_ids(PROMPT), random_ids(41, seed=1)]
    ids, mask = left_padded(rows)
    ids = torch.cat([ids, random_ids(2, TOTAL - PROMPT, seed=2)], 1)
    expected = read(stock, DynamicCache(config=stock.config), ids, PROMPT, mask)
    logits = read(model, HiveCache.for_model(model, recipe), ids, PROMPT, mask, chunk)
    assert divergence(logits[0], expected[0]) < 1e-5
    assert divergence(logits[1, PROMPT - 41 :], expected[1, PROMPT - 41 :]) < 1e-5


@pytest.mark.parametrize("recipe", SHARES)
@pytest.mark.parametrize("length", [1, 2, 33, 65])
def test_short_prompts_are_left_alone(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, length: int
) -> None:
    """A share never asks for fewer than 65 tokens, so nothing happens up to there."""
    ids = random_ids(1, FLOOR)
    cache = HiveCache.for_model(model, recipe)
    logits = read(model, cache, ids, length)
    assert divergence(logits, stock_logits(stock, ids, length)) < 1e-5
    assert bool((cache.report().kept == FLOOR).all())


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("padded", [False, True])
def test_beams_equal_the_stock_cache(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, padded: bool
) -> None:
    ids, mask = left_padded([random_ids(30), random_ids(17 if padded else 30, seed=1)])
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    cache = HiveCache.for_model(model, recipe)
    ours = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(ours, stock.generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("recipe", WHOLE)
def test_prompt_lookup_equals_plain_decoding(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str
) -> None:
    ids = random_ids(1, 12).repeat(1, 4)
    cache = HiveCache.for_model(model, recipe)
    ours = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=30,
        do_sample=False,
        prompt_lookup_num_tokens=4,
    )
    assert torch.equal(ours, stock.generate(ids, max_new_tokens=30, do_sample=False))
