"""KV-Compress: votes, page law, schedule, and one eviction for all layers of a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.policies.kv_compress import KVCompress
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from kvhive.step import Step
from tests.support import Feeder, divergence, kept_sets, left_padded, random_ids, read

SMALL = "kv_compress(protected_window=6, observed=8, page=4, slack=0)@20"


def pages_held(cache: HiveCache, page: int, row: int = 0) -> int:
    """Pages of one row, over all layers and heads."""
    kept = cache.report().kept[:, row]
    return int((-(-kept // page)).sum())


def probabilities(seed: int, heads: int, rows: int, n: int) -> Tensor:
    """Causal attention of the last `rows` of n queries, float32 `[1, heads, rows, n]`."""
    logits = torch.randn(1, heads, rows, n, generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(rows, n, dtype=torch.bool).triu(n - rows + 1)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("buffer", [0, 1, 5])
@pytest.mark.parametrize(("pool", "block"), [(1, 4096), (7, 4096), (3, 4), (7, 1)])
def test_votes_are_those_of_the_definition(norm: str, buffer: int, pool: int, block: int) -> None:
    rows, n = 11, 23
    given = probabilities(0, 4, rows, n)
    policy = KVCompress(norm=norm, buffer=buffer, pool=pool, query_block=block)  # type: ignore[arg-type]
    slots = Slots(1, 2, policy.columns, policy.counters, torch.device("cpu"))
    slots.append(Step.plain(0, n), n)
    votes = policy.votes(given, slots, torch.tensor([True]))
    for head in range(4):
        expected = [0.0] * n
        for start in range(0, rows, block):
            sums = [0.0] * n
            for query in range(start, min(start + block, rows)):
                for key in range(n - rows + query - buffer + 1):
                    p = float(given[0, head, query, key])
                    sums[key] += p * p if norm == "l2" else p
            for key in range(n):
                around = sums[max(0, key - pool // 2) : key + pool // 2 + 1]
                expected[key] += max(around)
        torch.testing.assert_close(votes[0, head], torch.tensor(expected))


def test_the_page_law_holds_at_every_step(model: PreTrainedModel) -> None:
    """After each eviction the model holds budget / page pages a head, shared out unevenly."""
    cache = HiveCache.for_model(model, SMALL)
    ids = random_ids(1, 160)
    seen = 0
    uneven = False
    for step in [70, *[1] * 40, 30, *[1] * 20]:
        read(model, cache, ids[:, seen : seen + step], step)
        seen += step
        kept = cache.report().kept
        assert pages_held(cache, 4) <= 20 // 4 * 4
        assert float(kept.double().mean()) <= 20
        uneven |= int(kept.max()) > 20
        for layer in cache.positions_kept():
            for head in layer[0].tolist():
                assert set(range(seen - 5, seen)) <= set(head), "the window stays in every head"
        cache.hive_layers()[0].slots.valid.all()
    assert uneven, "heads were expected to differ"


def test_who_gives_up_pages_is_left_with_full_ones(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, SMALL)
    read(model, cache, random_ids(1, 71), 71)
    kept = cache.report().kept.flatten().tolist()
    assert all(count % 4 == 0 for count in kept)
    assert sum(kept) == 20 * 4, "enough was evictable, so all of the budget is used"


def test_the_budget_is_rounded_up_to_pages_and_least_budgets_hold(model: PreTrainedModel) -> None:
    policy = KVCompress(protected_window=6, sink=3, observed=8, page=8)
    assert policy.sizing.peak(20) == 24
    assert policy.sizing.least == 9
    cache = HiveCache.for_model(model, Recipe.parse("kv_compress(page=8, protected_window=6)@20"))
    read(model, cache, random_ids(1, 90), 90)
    assert cache.report().tokens_kept == 24
    least = HiveCache.for_model(
        model, "kv_compress(page=8, protected_window=6, sink=3, observed=8, slack=0)@9"
    )
    read(model, least, random_ids(1, 120), 90)
    assert pages_held(least, 8) <= 2 * 4
    assert all({0, 1, 2} <= set(head) for layer in kept_sets(least) for head in layer)


def test_what_is_kept_is_as_it_was_written(model: PreTrainedModel) -> None:
    ids = random_ids(1, 90)
    cache, full = HiveCache.for_model(model, SMALL), HiveCache.for_model(model, "full")
    read(model, cache, ids, 90)
    read(model, full, ids, 90)
    for ours, whole in zip(cache.hive_layers(), full.hive_layers(), strict=True):
        index = ours.slots.position.long().clamp_min(0)[..., None]
        valid = ours.slots.valid
        for held, written in zip(ours.store.view(), whole.store.view(), strict=True):
            assert torch.equal(held[valid], written.gather(2, index.expand_as(held))[valid])


def test_rows_are_judged_alone(model: PreTrainedModel) -> None:
    """A short row keeps what it has, a long one gives up what it must."""
    prompts = [random_ids(length, seed=length) for length in (88, 15, 41)]
    tails = random_ids(3, 25, seed=9)
    ids, mask = left_padded(prompts)
    batch = HiveCache.for_model(model, SMALL)
    together = read(model, batch, torch.cat([ids, tails], 1), 88, mask)
    for row, prompt in enumerate(prompts):
        alone = HiveCache.for_model(model, SMALL)
        single = read(model, alone, torch.cat([prompt, tails[row]])[None], len(prompt))
        assert kept_sets(batch, row) == kept_sets(alone)
        assert divergence(together[row, 88 - len(prompt) :], single[0]) < 1e-5


def test_a_fork_evicts_for_itself(model: PreTrainedModel) -> None:
    """Both go on as one would have, and neither touches the other's layers."""
    ids = random_ids(1, 120)
    straight = HiveCache.for_model(model, SMALL)
    expected = read(model, straight, ids, 80)[:, 80:]
    cache = HiveCache.for_model(model, SMALL)
    read(model, cache, ids[:, :80], 80)
    before = kept_sets(cache)
    forked = cache.fork()
    assert torch.equal(read(model, forked, ids[:, 80:], 1), expected)
    assert kept_sets(forked) == kept_sets(straight)
    assert kept_sets(cache) == before
    assert torch.equal(read(model, cache, ids[:, 80:], 1), expected)
    own = {id(layer) for layer in forked.hive_layers()}
    assert all({id(peer) for peer in layer.layers} == own for layer in forked.hive_layers())
    (progress,) = {id(layer.progress) for layer in forked.hive_layers()}
    assert all(id(layer.progress) != progress for layer in cache.hive_layers())
    assert not own & {id(layer) for layer in copy.copy(cache.hive_layers())}


def test_reordered_rows_continue_as_their_source(model: PreTrainedModel) -> None:
    prompt, tail = random_ids(2, 60), random_ids(1, 20, seed=4)
    cache = HiveCache.for_model(model, SMALL)
    read(model, cache, prompt, 60)
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = read(model, cache, tail.expand(2, -1), 1)
    alone = HiveCache.for_model(model, SMALL)
    read(model, alone, prompt[1:], 60)
    assert divergence(logits[0], read(model, alone, tail, 1)[0]) < 1e-5
    assert kept_sets(cache, 0) == kept_sets(cache, 1) == kept_sets(alone)


def test_recorded_tokens_are_judged_when_the_last_layer_is_cropped(model: PreTrainedModel) -> None:
    """Nothing goes before the crop; then what stays votes in all layers, and all evict at once."""
    ids = random_ids(1, 66)
    plain = HiveCache.for_model(model, SMALL)
    read(model, plain, ids[:, :60], 60)
    cache = HiveCache.for_model(model, SMALL)
    for layer in cache.hive_layers():
        layer.activate_past_recording()
    read(model, cache, ids, 66)
    assert cache.report().kept.unique().tolist() == [66]
    cache.crop(-6)
    assert kept_sets(cache) == kept_sets(plain)
    assert cache.get_seq_length() == 60
    out = model.generate(
        random_ids(1, 12).repeat(1, 4),
        past_key_values=(speculated := HiveCache.for_model(model, SMALL)),
        max_new_tokens=40,
        do_sample=False,
        prompt_lookup_num_tokens=4,
    )
    assert out.shape == (1, 88)
    assert pages_held(speculated, 4) <= 20


def test_frozen_caches_wait_and_room_can_be_made(model: PreTrainedModel) -> None:
    ids = random_ids(1, 140)
    cache = HiveCache.for_model(model, SMALL)
    read(model, cache, ids[:, :60], 60)
    held = int(cache.report().kept.sum())
    with cache.freeze():
        read(model, cache, ids[:, 60:70], 10)
        assert int(cache.report().kept.sum()) == held + 10 * 4
    cache.make_room(10)
    assert float(cache.report().kept.double().mean()) <= 10
    read(model, cache, ids[:, 70:80], 10)
    assert float(cache.report().kept.double().mean()) <= 20
    assert cache.report().tokens_seen == 80


def test_decode_none_compresses_prompts_only(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(
        model, "kv_compress(protected_window=6, observed=8, page=4, decode=none)@20"
    )
    read(model, cache, random_ids(1, 90), 60)
    after = cache.report().kept
    assert float(after.double().mean()) == 50
    read(model, cache, random_ids(1, 10), 10)
    assert float(cache.report().kept.double().mean()) <= 20


def test_the_interval_is_counted_from_the_prompt(model: PreTrainedModel) -> None:
    recipe = "kv_compress(protected_window=6, observed=8, page=4, interval=5, slack=0)@20"
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, random_ids(1, 60), 60)
    for generated in range(1, 21):
        read(model, cache, random_ids(1, 1, seed=generated), 1)
        mean = float(cache.report().kept.double().mean())
        assert mean <= 20 if generated % 5 == 0 else mean > 20 - 4


def test_slack_frees_whole_pages_in_reserve(model: PreTrainedModel) -> None:
    """One eviction then serves several generated tokens."""
    cache = HiveCache.for_model(
        model, "kv_compress(protected_window=6, observed=8, page=4, slack=8)@20"
    )
    read(model, cache, random_ids(1, 60), 60)
    evictions = []
    for generated in range(24):
        before = int(cache.report().kept.sum())
        read(model, cache, random_ids(1, 1, seed=generated), 1)
        assert pages_held(cache, 4) <= 20
        if int(cache.report().kept.sum()) < before + 4:
            evictions.append(generated)
    assert 2 <= len(evictions) <= 6
    assert KVCompress().sizing.slack(1024) == 32
    assert KVCompress().sizing.slack(256) == 16
    assert KVCompress().sizing.slack(127) == 0


def test_a_rate_keeps_its_share_of_what_is_older(model: PreTrainedModel) -> None:
    """The window in whole pages, and of all tokens before it, seen so far, the share."""
    recipe = Recipe.parse("kv_compress(rate=0.25, protected_window=6, observed=8, page=4)")
    cache = HiveCache.for_model(model, recipe)
    ids = random_ids(1, 200)
    read(model, cache, ids[:, :7], 7)
    assert cache.report().kept.unique().tolist() == [7], "nothing is older than the window"
    read(model, cache, ids[:, 7:100], 93)
    for seen in range(100, 200):
        mean = float(cache.report().kept.double().mean())
        wanted = 8 + (seen + 1 - 8) * 0.25
        assert wanted - 4 <= mean <= recipe.policy.sizing.alone(seen)
        read(model, cache, ids[:, seen : seen + 1], 1)


def test_memory_follows_the_longest_head_of_each_layer(model: PreTrainedModel) -> None:
    """Dense storage holds what it must and a little room to grow."""
    cache = HiveCache.for_model(model, "kv_compress(observed=8, page=4, protected_window=6)@40")
    read(model, cache, random_ids(1, 400), 300)
    for layer in cache.hive_layers():
        assert layer.store.room <= int(layer.slots.count.max()) + 32


def test_knobs_are_checked() -> None:
    for knobs, message in (
        ({"observed": 0}, "observed must be at least 1, got 0"),
        ({"protected_window": 0}, "protected_window must be at least 1, got 0"),
        ({"page": 0}, "page must be at least 1, got 0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"query_block": 0}, "query_block must be at least 1, got 0"),
        ({"sink": -1}, "sink must be at least 0, got -1"),
        ({"pool": 4}, "pool must be an odd number, got 4"),
        ({"buffer": 33}, "buffer must be at most protected_window = 32, got 33"),
        ({"rate": 0.0}, r"rate must lie in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"kv_compress: {message}"):
            KVCompress(**knobs)
    with pytest.raises(ValueError, match="norm must be 'l2' or 'l1', got 'l3'"):
        Recipe.parse("kv_compress(norm=l3)@64")
    with pytest.raises(ValueError, match="decode must be 'continual' or 'none', got 'twice'"):
        Recipe.parse("kv_compress(decode=twice)@64")
    with pytest.raises(ValueError, match="takes no budget"):
        Recipe.parse("kv_compress(rate=0.5)@0.5")
    with pytest.raises(ValueError, match="kv_compress needs a budget"):
        Recipe.parse("kv_compress")
    with pytest.raises(ValueError, match="below 32"):
        Recipe.parse("kv_compress@31")


def test_padding_between_turns_is_no_neighbour() -> None:
    """Votes are pooled past it, so that metrics are those of the row alone."""
    recipe = "kv_compress(protected_window=6, observed=8, page=4, buffer=3, query_block=3)@20"
    together, alone = Feeder(recipe, tapes=(0, 1)), Feeder(recipe, tapes=(1,))
    for long, short in ((40, 20), (60, 25), (1, 1), (30, 7), (5, 1), (1, 1)):
        together.step([long, short])
        alone.step(short)
        for head in range(alone.kv_heads):
            ours, own = together.layer.slots, alone.layer.slots
            held, expected = ours.valid[1, head], own.valid[0, head]
            assert torch.equal(ours.position[1, head][held], own.position[0, head][expected])
            torch.testing.assert_close(
                ours["metric"][1, head][held], own["metric"][0, head][expected]
            )
