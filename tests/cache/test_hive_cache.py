"""HiveCache: reports that tell the truth, and the ways to use one cache for several turns."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.report import Report
from kvhive.recipe import Recipe
from tests.support import kept_sets, left_padded, random_ids, read, tiny, tiny_llama

PER_TOKEN = 2 * 2 * 8 * 2 * 4  # layers, KV heads, width, keys and values, bytes
MIB = 2**20


def test_an_empty_cache_holds_nothing(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "buzz@0.4")
    report = cache.report()
    assert (report.tokens_seen, report.tokens_kept, report.nbytes, report.full_nbytes) == (0,) * 4
    assert report.ratio == 1.0
    assert str(report) == "0 tokens seen, 0 kept, 0.0 MiB of 0.0 MiB (1.00x)"
    assert cache.get_seq_length() == cache.nbytes == 0


def test_the_full_cache_costs_its_keys_values_and_positions(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "full")
    read(model, cache, random_ids(1, 100), 100)
    report = cache.report()
    assert report.full_nbytes == 100 * PER_TOKEN
    counts = 2 * 2 * 8  # one a layer and KV head; positions are only written down when asked for
    assert report.nbytes == 100 * PER_TOKEN + counts
    cache.positions_kept()
    assert cache.nbytes == 100 * (PER_TOKEN + 2 * 2 * 2) + counts
    assert report.kept.tolist() == [[[100, 100]]] * 2


def test_numbers_of_a_small_budget(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "h2o(slack=0)@24")
    read(model, cache, random_ids(2, 130), 100)
    report = cache.report()
    assert report.recipe == "h2o(slack=0)@24"
    assert report.positions == "original"
    assert report.layers == (0, 1)
    assert report.seen.tolist() == [130, 130]
    assert report.kept.shape == (2, 2, 2)
    assert bool((report.kept == 24).all())
    assert (report.tokens_seen, report.tokens_kept) == (130, 24)
    assert report.full_nbytes == 2 * 130 * PER_TOKEN
    per_slot = PER_TOKEN + 2 * 2 * (2 + 4)
    assert 2 * 24 * per_slot <= report.nbytes <= 2 * 26 * per_slot
    assert report.ratio == report.full_nbytes / report.nbytes > 4
    assert report.nbytes == cache.nbytes


def test_the_report_in_words() -> None:
    report = Report(
        recipe="buzz@0.4",
        positions="cache",
        layers=(0,),
        seen=torch.tensor([1843]),
        kept=torch.tensor([[[737, 736]]]),
        nbytes=int(16.9 * MIB),
        full_nbytes=int(42.2 * MIB),
    )
    expected = "1,843 tokens seen, 736 kept, 16.9 MiB of 42.2 MiB (2.50x)"
    assert str(report) == expected
    batch = Report("h2o@9", "cache", (0,), torch.tensor([5, 20]), torch.tensor([[[1], [9]]]), 1, 3)
    assert str(batch).startswith("20 tokens seen in the longest of 2 rows, 9 kept, ")
    assert batch.ratio == 3.0


def test_rows_are_counted_without_their_padding(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "window(slack=0)@24")
    ids, mask = left_padded([random_ids(90), random_ids(11, seed=1)])
    read(model, cache, ids, 90, mask)
    report = cache.report()
    assert report.seen.tolist() == [90, 11]
    assert report.kept[0, :, 0].tolist() == [24, 11]
    assert report.full_nbytes == 2 * 90 * PER_TOKEN
    positions = cache.positions_kept()
    assert len(positions) == 2
    assert positions[0].dtype == torch.int32
    assert positions[0][1, 0].tolist() == [-1] * 13 + list(range(11))
    assert kept_sets(cache, 0)[0][0] == list(range(66, 90))


def test_stock_layers_are_counted_too() -> None:
    hybrid = tiny(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )
    cache = HiveCache.for_model(hybrid, "window(slack=0)@24")
    read(hybrid, cache, random_ids(1, 90), 90)
    report = cache.report()
    assert report.layers == (0,)
    assert len(cache.hive_layers()) == 1
    held = [(layer.keys, layer.values) for layer in cache.layers[1:]]
    stock = sum(part.untyped_storage().nbytes() for pair in held for part in pair)
    assert stock > 0
    counters = report.nbytes - stock - cache.hive_layers()[0].nbytes - cache.progress.nbytes
    assert 0 <= counters <= 8 * len(held)
    assert report.full_nbytes == stock + counters + 90 * PER_TOKEN // 2


LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}


def test_states_of_linear_layers_are_counted() -> None:
    """They hold no keys and values, but tensors of their own."""
    hybrid = tiny("qwen3_next", **LINEAR)
    cache = HiveCache.for_model(hybrid, "h2o@24")
    read(hybrid, cache, random_ids(1, 60), 60)
    found = _bytes_of_tensors(cache.layers[:3])
    assert found > 0
    assert cache.nbytes == found + cache.hive_layers()[0].nbytes + cache.progress.nbytes


def _bytes_of_tensors(held: object) -> int:
    """Of all tensors within lists, dictionaries and plain objects."""
    if isinstance(held, torch.Tensor):
        return held.untyped_storage().nbytes()
    if isinstance(held, list | tuple):
        return sum(map(_bytes_of_tensors, held))
    inside = held if isinstance(held, dict) else getattr(held, "__dict__", {})
    return sum(map(_bytes_of_tensors, inside.values()))


def test_a_recipe_may_be_text_or_object(model: PreTrainedModel) -> None:
    recipe = Recipe.parse("buzz(positions=original)@30")
    for given in (recipe, str(recipe)):
        cache = HiveCache.for_model(model, given)
        assert cache.recipe == recipe
        assert cache.positions == "original"
    assert HiveCache.for_model(model, "buzz(preset=paper)@30").positions == "cache"
    assert HiveCache.for_model(model, "h2o(positions=cache)@30").positions == "cache"
    with pytest.raises(ValueError, match="unknown policy 'bizz'"):
        HiveCache.for_model(model, "bizz@30")


def test_frozen_until_thawed(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "window(slack=0)@24")
    read(model, cache, random_ids(1, 60), 60)
    handle = cache.freeze()
    read(model, cache, random_ids(1, 10), 10)
    assert cache.report().tokens_kept == 34
    cache.thaw()
    read(model, cache, random_ids(1, 1), 1)
    assert cache.report().tokens_kept == 24
    with handle as same:
        assert same is cache
    with pytest.raises(RuntimeError, match="inside"), cache.freeze():
        raise RuntimeError("inside")
    assert not cache.progress.frozen


def test_freezing_twice_needs_thawing_twice(model: PreTrainedModel) -> None:
    """The inner block's end leaves the outer one in force."""
    cache = HiveCache.for_model(model, "window(slack=0)@24")
    with cache.freeze():
        read(model, cache, random_ids(1, 60), 60)
        with cache.freeze():
            read(model, cache, random_ids(1, 5), 5)
        read(model, cache, random_ids(1, 5), 5)
        assert cache.report().tokens_kept == 70
    read(model, cache, random_ids(1, 1), 1)
    assert cache.report().tokens_kept == 24


def test_room_for_a_turn(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "window(slack=0)@24")
    read(model, cache, random_ids(1, 60), 60)
    cache.make_room(0)
    assert cache.report().tokens_kept == 24
    cache.make_room(10)
    assert cache.report().tokens_kept == 14
    read(model, cache, random_ids(1, 10), 10)
    assert kept_sets(cache)[0][0] == list(range(46, 70))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.make_room(-1)


def test_reset_of_the_whole_cache(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "h2o@24")
    ids = random_ids(1, 60)
    first = read(model, cache, ids, 50)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(read(model, cache, ids, 50), first)


def test_fork_shares_nothing_but_facts(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "buzz@24")
    read(model, cache, random_ids(1, 60), 60)
    fork = cache.fork()
    assert fork.facts is cache.facts
    assert fork.recipe == cache.recipe
    addresses = [
        {layer.store.keys.data_ptr() for layer in either.hive_layers()} for either in (cache, fork)
    ]
    assert not addresses[0] & addresses[1]


def test_a_cache_forgets_its_model() -> None:
    """Facts of a model are kept only as long as the model lives."""
    model = tiny("llama")
    HiveCache.for_model(model, "buzz@24")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_recipe_can_be_pickled() -> None:
    recipe = Recipe.parse("buzz(stride=7)@0.4")
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize("recipe", ["h2o@24", "buzz@24", "kv_compress(page=4)@40", "corm@60"])
def test_a_cache_can_be_pickled(model: PreTrainedModel, recipe: str) -> None:
    """It goes on where it was, with the model it was made for and no other."""
    ids = random_ids(1, 90)
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, ids[:, :70], 60)
    packed = pickle.dumps(cache)
    expected = read(model, cache, ids[:, 70:], 1)
    again = pickle.loads(packed)
    assert torch.equal(read(model, again, ids[:, 70:], 1), expected)
    assert str(again.report()) == str(cache.report())
    other = tiny_llama(seed=1)
    HiveCache.for_model(other, recipe)
    with pytest.raises(ValueError, match="made for another LlamaForCausalLM"):
        read(other, pickle.loads(packed), ids[:, :1], 1)


@pytest.mark.parametrize("padded", [False, True])
def test_reading_leaves_the_cache_ready_for_generate(model: PreTrainedModel, padded: bool) -> None:
    ids, mask = left_padded([random_ids(60), random_ids(41, seed=1)])
    if not padded:
        ids, mask = ids[:1], mask[:1]
    whole = torch.cat([ids, random_ids(len(ids), 9, seed=2)], 1)
    covered = torch.nn.functional.pad(mask, (0, 9), value=1)
    cache, by_hand = (HiveCache.for_model(model, "h2o@24") for _ in range(2))
    logits = cache.read(ids, mask if padded else None, prefill_chunk=16)
    expected = read(model, by_hand, ids, 60, mask if padded else None, chunk=16)
    assert torch.allclose(logits, expected[:, -1], atol=1e-5)
    assert kept_sets(cache) == kept_sets(by_hand)
    given = {"attention_mask": covered, "max_new_tokens": 8, "do_sample": False}
    fork = cache.fork()
    ours = model.generate(whole, past_key_values=cache, **given)
    theirs = model.generate(whole, past_key_values=by_hand, **given)
    assert torch.equal(ours, theirs)
    assert torch.equal(model.generate(whole, past_key_values=fork, **given), ours)


def test_what_a_cache_does_not_read() -> None:
    model = tiny("llama")
    cache = HiveCache.for_model(model, "h2o@24")
    ids, mask = left_padded([random_ids(20), random_ids(11, seed=1)])
    for wrong, padding, words in (
        (ids[0], None, "input_ids must be"),
        (ids[:, :0], None, "input_ids must be"),
        (ids, mask[:, 1:], "attention_mask must have"),
        (ids, mask.flip(1), "pad on the left"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.read(wrong, padding)
    cache.read(ids, mask)
    with pytest.raises(ValueError, match="holds a padded batch"):
        cache.read(ids)
    assert repr(cache) == "HiveCache(h2o@24: 2 rows, 20 tokens seen, 20 kept, 0.0 MiB)"
    del model
    gc.collect()
    with pytest.raises(ValueError, match="no longer loaded"):
        cache.read(ids, torch.cat([mask, torch.ones_like(mask)], 1))


def test_a_cache_in_any_state_has_a_repr(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "buzz@0.4")
    assert repr(cache) == "HiveCache(buzz@0.4: empty)"
    with torch.inference_mode():
        cache.read(random_ids(1, 100))
        assert repr(cache).startswith("HiveCache(buzz@0.4: 100 tokens seen, ")
    assert repr(HiveCache.__new__(HiveCache)).startswith("HiveCache(not set up: cannot be read")


def test_a_short_cache_takes_little_room(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "full")
    read(model, cache, random_ids(1, 74), 73)
    assert cache.nbytes < 1.3 * cache.report().full_nbytes
