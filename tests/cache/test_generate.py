"""`model.generate` with our cache: every way of decoding, against the stock cache on the same
weights.
"""

from __future__ import annotations

import threading
from queue import Queue

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from kvhive.cache.hive_cache import HiveCache
from tests.support import (
    divergence,
    kept_sets,
    left_padded,
    random_ids,
    read,
    stock_logits,
    tiny,
    tiny_llama,
)

NEW = 24
RECIPES = ("full", "buzz@4096", "h2o@4096", "streaming_llm@4096")
SMALL = ("buzz@24", "h2o@24", "streaming_llm@24", "window@24", "buzz_log@24")


def both(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, ids: Tensor, **settings: object
) -> tuple[Tensor, Tensor]:
    """What generate gives with our cache, and with the stock cache."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    torch.manual_seed(7)
    ours = model.generate(ids, past_key_values=HiveCache.for_model(model, recipe), **settings)
    torch.manual_seed(7)
    return ours, stock.generate(ids, **settings)


class Collector(BaseStreamer):
    """A streamer that keeps what it is given, and when the end was told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended: Queue[bool] = Queue()

    def put(self, value: Tensor) -> None:
        """Tokens of the prompt first, then one at a time."""
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        """Generation is over."""
        self.ended.put(True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda settings: "+".join(settings) or "greedy",
)
def test_same_tokens_as_the_stock_cache(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, settings: dict[str, object]
) -> None:
    ours, theirs = both(model, stock, recipe, random_ids(1, 20).repeat(1, 2), **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}])
def test_left_padded_batches(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, settings: dict[str, object]
) -> None:
    ids, mask = left_padded([random_ids(40), random_ids(13, seed=1), random_ids(29, seed=2)])
    ours, theirs = both(model, stock, recipe, ids, attention_mask=mask, **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES + SMALL)
def test_every_dtype(dtype: torch.dtype, recipe: str) -> None:
    ours = tiny_llama(dtype=dtype)
    cache = HiveCache.for_model(ours, recipe)
    out = ours.generate(
        random_ids(2, 40),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1)
    assert bool(logits.isfinite().all())
    assert cache.hive_layers()[0].store.keys.dtype == dtype
    if recipe in RECIPES:
        ids = out.sequences[:, :-1]
        expected = stock_logits(tiny_llama(dtype=dtype), ids, 40)[:, 39:].float()
        error = (logits.float() - expected).norm() / expected.norm()
        assert error < {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]


@pytest.mark.parametrize("recipe", RECIPES + SMALL)
def test_streaming(model: PreTrainedModel, recipe: str) -> None:
    ids = random_ids(1, 40)
    streamer = Collector()
    settings = {"max_new_tokens": NEW, "do_sample": False}
    streamed = {"past_key_values": HiveCache.for_model(model, recipe), "streamer": streamer}
    worker = threading.Thread(target=model.generate, args=(ids,), kwargs={**settings, **streamed})
    worker.start()
    assert streamer.ended.get(timeout=60)
    worker.join()
    plain = model.generate(ids, past_key_values=HiveCache.for_model(model, recipe), **settings)
    assert streamer.tokens == plain[0].tolist()


@pytest.mark.parametrize("recipe", RECIPES + SMALL)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_second_turn_on_the_same_cache(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, rows: int
) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": False}
    cache = HiveCache.for_model(model, recipe)
    first = model.generate(random_ids(rows, 40), past_key_values=cache, **settings)
    ids = torch.cat([first, random_ids(rows, 15, seed=3)], dim=1)
    fork = cache.fork()
    second = model.generate(ids, past_key_values=cache, **settings)
    assert cache.get_seq_length() == second.shape[1] - 1
    if recipe in RECIPES:
        assert torch.equal(second, stock.generate(ids, **settings))
    only_new = model.generate(
        ids[:, -16:], attention_mask=torch.ones_like(ids), past_key_values=fork, **settings
    )
    assert torch.equal(only_new[:, 16:], second[:, ids.shape[1] :])


@pytest.mark.parametrize("recipe", RECIPES + SMALL)
def test_a_bare_loop_equals_generate(model: PreTrainedModel, recipe: str) -> None:
    """Nothing but ids and the cache: positions follow from the tokens the cache has seen."""
    ids = random_ids(1, 40)
    cache = HiveCache.for_model(model, recipe)
    generated, step = ids, ids
    for _ in range(NEW):
        logits = model(step, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        generated = torch.cat([generated, step], 1)
    twin = HiveCache.for_model(model, recipe)
    expected = model.generate(ids, past_key_values=twin, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generated, expected)
    assert kept_sets(cache) == kept_sets(twin)


@pytest.mark.parametrize("recipe", SMALL)
def test_two_live_caches_do_not_meet(model: PreTrainedModel, recipe: str) -> None:
    """Steps of two caches, and of a stock one, taken in turns on one model."""
    one, other = random_ids(1, 90, seed=1), random_ids(1, 70, seed=2)
    alone = read(model, HiveCache.for_model(model, recipe), one, 50)
    caches = [HiveCache.for_model(model, recipe), HiveCache.for_model(model, "h2o@30")]
    plain = DynamicCache(config=model.config)
    parts = [read(model, caches[0], one[:, :50], 50)]
    read(model, caches[1], other[:, :30], 30)
    for i in range(40):
        read(model, plain, other[:, i : i + 1], 1)
        parts.append(read(model, caches[0], one[:, 50 + i : 51 + i], 1))
        read(model, caches[1], other[:, 30 + i : 31 + i], 1)
    assert torch.equal(torch.cat(parts, 1), alone)


def test_two_threads_on_one_model(model: PreTrainedModel) -> None:
    recipes = ("buzz@24", "h2o@30", "streaming_llm@40", "full")
    ids = [random_ids(1, 120, seed=seed) for seed in range(len(recipes))]
    expected = [
        read(model, HiveCache.for_model(model, recipe), row, 60)
        for recipe, row in zip(recipes, ids, strict=True)
    ]
    results: dict[int, Tensor] = {}

    def work(place: int) -> None:
        cache = HiveCache.for_model(model, recipes[place])
        results[place] = read(model, cache, ids[place], 60)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, logits in enumerate(expected):
        assert torch.equal(results[place], logits)


def test_the_stock_cache_still_works_on_an_attached_model(
    model: PreTrainedModel, stock: PreTrainedModel
) -> None:
    HiveCache.for_model(model, "buzz@24")
    ids, mask = left_padded([random_ids(40), random_ids(13, seed=1)])
    for settings in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"use_cache": False}):
        settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask, **settings}
        assert torch.equal(model.generate(ids, **settings), stock.generate(ids, **settings))
    with torch.no_grad():
        assert divergence(model(ids[:1]).logits, stock(ids[:1]).logits) < 1e-6


@pytest.mark.parametrize("prompt", [1, 30])
def test_a_static_cache_still_works_on_an_attached_model(
    model: PreTrainedModel, stock: PreTrainedModel, prompt: int
) -> None:
    """Its keys have room for tokens to come, which must stay out of sight."""
    HiveCache.for_model(model, "full")
    ids, mask = left_padded([random_ids(prompt + 10), random_ids(10, seed=1)])
    ids = torch.cat([ids, random_ids(2, 8, seed=2)], 1)
    cache = StaticCache(config=model.config, max_cache_len=64)
    ours = read(model, cache, ids, prompt + 10, mask)
    theirs = read(stock, DynamicCache(config=stock.config), ids, prompt + 10, mask)
    assert divergence(ours[0], theirs[0]) < 1e-5
    assert divergence(ours[1, prompt:], theirs[1, prompt:]) < 1e-5


@pytest.mark.parametrize("wrong", ["batch", "heads", "width", "dtype", "layers"])
def test_a_cache_belongs_to_one_model_and_batch(model: PreTrainedModel, wrong: str) -> None:
    cache = HiveCache.for_model(model, "buzz@24")
    read(model, cache, random_ids(1, 40), 40)
    others = {
        "heads": {"num_key_value_heads": 4},
        "width": {"head_dim": 16},
        "layers": {"num_hidden_layers": 3},
    }
    other = tiny("llama", **others[wrong]) if wrong in others else tiny_llama()
    if wrong == "dtype":
        other = other.to(torch.bfloat16)
    HiveCache.for_model(other, "full")
    with pytest.raises(ValueError, match=r"a cache belongs to one model"):
        read(other, cache, random_ids(2 if wrong == "batch" else 1, 1), 1)


def test_a_model_that_was_never_attached_is_found_out(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "buzz@24")
    foreign = tiny_llama()
    read(foreign, cache, random_ids(1, 40), 40)
    with pytest.raises(ValueError, match="another attention than 'kvhive'"):
        read(foreign, cache, random_ids(1, 1), 1)
    HiveCache.for_model(foreign, "full")
    assert foreign(random_ids(1, 4)).logits.shape == (1, 4, 499)
