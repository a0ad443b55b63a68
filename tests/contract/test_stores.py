"""What holds of every policy holds whatever form its tokens are held in: products with stores.

Stores that need to know something of the model have tests of their own.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from kvhive.stores import STORES
from kvhive.stores.dense import Dense
from tests.contract.recipes import fullest
from tests.support import (
    divergence,
    kept_sets,
    left_padded,
    random_ids,
    read,
    tensors,
    tiny_llama,
)

SPELLED = {
    "kivi": "kivi(bits=8, group=8, residual=8, sink=2)",
    "rotated": "rotated(bits=8, residual=8, sink=2)",
    "tiers": "tiers(bits=8, rest_bits=4, share=0.2, group=8, residual=8, sink=2)",
}
FEW = tuple(SPELLED)  # those of few bits
OWN_TESTS = ("dense", "kvsharer", "less")
STORED = [
    "full+kivi",
    "full+rotated",
    "h2o@96+rotated",
    "snapkv@0.5+tiers",
    "snapkv@0.5+kivi",
    "buzz@0.6+rotated",
    "hive(reconstruct=false)@0.5+tiers",
    "tova(slack=0)@96+rotated",
    "h2o@0.5/global+tiers",
    "h2o@0.5/global+rotated",
    "snapkv@0.5/ada+tiers",
    "streaming_llm(positions=original)@96+kivi",
    "streaming_llm@96+rotated",
    "elastic@0.5+rotated",
    "corm+rotated",
]
STORED += [
    f"snapkv@0.5+{name}"
    for name in STORES
    if name not in (*SPELLED, *OWN_TESTS) and STORES[name].calibration is None
]
PROMPT, DECODED = 150, 45
STEADY = 10  # tokens within which no rounding changes a vote
LOST = {"kivi": 0.05, "rotated": 0.05, "tiers": 0.3}  # KL in nats; 4 bits of 16 numbers are few
ONCE = [recipe for recipe in STORED if recipe.startswith(("full", "snapkv", "hive"))]
SOME = [*STORED[:5], "tova(slack=0)@96+rotated", "h2o@0.5/global+tiers", "streaming_llm@96+rotated"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Heads of 16 numbers, which fill whole bytes."""
    return tiny_llama(hidden_size=64)


def parsed(recipe: str) -> Recipe:
    """With the store's short sinks and windows, so that little is enough to be packed."""
    front, _, store = recipe.rpartition("+")
    return Recipe.parse(f"{front}+{SPELLED.get(store, store)}")


def densely(recipe: Recipe) -> Recipe:
    """The same with its tokens held as they are."""
    return replace(recipe, store=Dense())


def few_bits(recipe: Recipe) -> bool:
    """Whether only rounding keeps it from what the dense store gives."""
    return recipe.store.name in FEW


@pytest.mark.parametrize("recipe", STORED)
def test_it_is_near_the_dense_store(model: PreTrainedModel, recipe: str) -> None:
    """What is kept of a prompt is the same; what comes out then is nearly so, in fewer bytes."""
    stored = parsed(recipe)
    ids = random_ids(1, PROMPT + DECODED)
    ours, dense = (HiveCache.for_model(model, one) for one in (stored, densely(stored)))
    first, expected = (read(model, cache, ids[:, :PROMPT], PROMPT) for cache in (ours, dense))
    assert torch.equal(first, expected)
    assert kept_sets(ours) == kept_sets(dense)
    if few_bits(stored):
        size = [sum(layer.store.nbytes for layer in c.hive_layers()) for c in (ours, dense)]
        assert size[0] < 0.6 * size[1]
        assert ours.nbytes < dense.nbytes
    later, then = (read(model, cache, ids[:, PROMPT:], 1) for cache in (ours, dense))
    if few_bits(stored):
        assert divergence(later[:, :20], then[:, :20]) < LOST[stored.store.name]
    budget, policy = stored.budget, ours.recipe.policy
    if budget is not None and policy.sizing.decoding:
        most = policy.sizing.peak(budget.resolve(PROMPT, policy.sizing.least))
        assert fullest(stored, ours.report().kept) <= most


@pytest.mark.parametrize("recipe", STORED)
def test_a_row_of_a_padded_batch_is_as_it_is_alone(model: PreTrainedModel, recipe: str) -> None:
    stored, lengths = parsed(recipe), (PROMPT, 97)
    texts = [random_ids(length + STEADY, seed=length) for length in lengths]
    ids, mask = left_padded([text[:-STEADY] for text in texts])
    ids = torch.cat([ids, torch.stack([text[-STEADY:] for text in texts])], 1)
    batch = HiveCache.for_model(model, stored)
    read(model, batch, ids[:, :PROMPT], PROMPT, mask)
    kept = [kept_sets(batch, row) for row in range(2)]
    more = F.pad(mask, (0, STEADY), value=1)
    together = continued(model, batch, ids[:, PROMPT:], more)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = HiveCache.for_model(model, stored)
        read(model, alone, text[None, :length], length)
        assert kept[row] == kept_sets(alone)
        single = read(model, alone, text[None, length:], 1)[0]
        assert divergence(together[row], single) < 1e-3


@torch.no_grad()
def continued(model: PreTrainedModel, cache: HiveCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of ids `[b, n]`, one after another, behind what the cache holds; mask: of all."""
    seen, parts = mask.shape[1] - ids.shape[1], []
    positions = mask.cumsum(1) - 1
    for step in range(ids.shape[1]):
        stop = seen + step + 1
        out = model(
            ids[:, step : step + 1],
            past_key_values=cache,
            attention_mask=mask[:, :stop],
            position_ids=positions[:, stop - 1 : stop],
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("recipe", STORED)
def test_the_bytes_reported_are_all_there_are(model: PreTrainedModel, recipe: str) -> None:
    """Of two rows, one padded; after a prompt, after decoding, after a second turn; and when a
    cache is pickled, forked, reordered or reset.
    """
    cache = HiveCache.for_model(model, parsed(recipe))
    ids, mask = left_padded([random_ids(PROMPT + 20), random_ids(90, seed=1)])
    read(model, cache, ids, PROMPT, mask)
    honest(cache)
    fork, pickled = cache.fork(), pickle.loads(pickle.dumps(cache))
    more = F.pad(mask, (0, 30), value=1)
    positions = (more.cumsum(1) - 1)[:, -30:]
    with torch.no_grad():
        outputs = [
            model(
                random_ids(2, 30, seed=7),
                past_key_values=one,
                attention_mask=more,
                position_ids=positions,
            ).logits
            for one in (cache, fork, pickled)
        ]
    honest(cache)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert kept_sets(cache, 1) == kept_sets(fork, 1) == kept_sets(pickled, 1)
    before = [kept_sets(cache, row) for row in range(2)]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert [kept_sets(cache, row) for row in range(3)] == [before[1], before[1], before[0]]
    honest(cache)
    cache.reset()
    assert cache.nbytes == 0
    fresh = HiveCache.for_model(model, parsed(recipe))
    ids = random_ids(1, PROMPT + 10)
    assert torch.equal(read(model, cache, ids, PROMPT), read(model, fresh, ids, PROMPT))


def honest(cache: HiveCache) -> None:
    """Is every tensor of the cache in its bytes, once?"""
    layers = cache.hive_layers()
    parts = [[layer.store, layer.slots, layer.late] for layer in layers]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors(parts, set())
    }
    held = sum(layer.nbytes - layer.turning.nbytes for layer in layers)  # whose tables are shared
    assert held == sum(storages.values())


@pytest.mark.parametrize("recipe", SOME)
def test_a_frozen_cache_loses_nothing(model: PreTrainedModel, recipe: str) -> None:
    ids = random_ids(1, PROMPT + 40)
    cache = HiveCache.for_model(model, parsed(recipe))
    read(model, cache, ids[:, :PROMPT], PROMPT)
    before, added = kept_sets(cache), list(range(PROMPT, PROMPT + 40))
    with cache.freeze():
        read(model, cache, ids[:, PROMPT:], 25)
        assert kept_sets(cache) == [[head + added for head in layer] for layer in before]
    read(model, cache, random_ids(1, 1), 1)
    assert cache.get_seq_length() == PROMPT + 41


@pytest.mark.parametrize("recipe", SOME)
def test_beams_and_drafts_run(model: PreTrainedModel, recipe: str) -> None:
    """Drafted tokens leave as many as decoding leaves."""
    ids = random_ids(1, 30).repeat(1, 4)
    beams = HiveCache.for_model(model, parsed(recipe))
    model.generate(ids, past_key_values=beams, max_new_tokens=12, num_beams=3, do_sample=False)
    assert beams.report().kept.shape[1] == 3
    kept = []
    for more in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = HiveCache.for_model(model, parsed(recipe))
        model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False, **more)
        cache.end_recording()
        kept.append(cache.report().tokens_kept)
        assert cache.get_seq_length() == 149
    assert abs(kept[0] - kept[1]) <= 4  # what is accepted of the first draft counts as prompt


@pytest.mark.parametrize("recipe", ["full+kivi", "full+rotated"])
def test_what_was_packed_can_be_taken_back(model: PreTrainedModel, recipe: str) -> None:
    """Into the exact end, into the packed middle, into the sinks, and all of it."""
    ids = random_ids(1, PROMPT)
    cache = HiveCache.for_model(model, parsed(recipe))
    read(model, cache, ids, PROMPT)
    for left in (146, 80, 5, 1):
        cache.crop(left - cache.get_seq_length())
        assert kept_sets(cache) == [[list(range(left))] * 2] * 2
        honest(cache)
    again = read(model, cache, ids[:, 1:], PROMPT - 1)
    expected = read(model, HiveCache.for_model(model, "full"), ids, PROMPT)
    assert divergence(again, expected[:, 1:]) < 1e-5


@pytest.mark.parametrize("recipe", ONCE)
def test_a_prompt_may_come_in_chunks(model: PreTrainedModel, recipe: str) -> None:
    """Rounding is all that comes between: with no budget what is read is nearly the same."""
    stored = parsed(recipe)
    ids, mask = left_padded([random_ids(PROMPT), random_ids(90, seed=1)])
    cache = HiveCache.for_model(model, stored)
    ours = read(model, cache, ids, PROMPT, mask, 11)
    assert cache.report().seen.tolist() == [PROMPT, 90]
    if stored.budget is None:
        expected = read(model, HiveCache.for_model(model, stored), ids, PROMPT, mask)
        assert divergence(ours[mask.bool()], expected[mask.bool()]) < 0.05
    else:
        most = stored.policy.sizing.peak(stored.budget.resolve(PROMPT, stored.policy.sizing.least))
        assert fullest(stored, cache.report().kept) <= most
