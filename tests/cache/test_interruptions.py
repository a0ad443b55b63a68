"""A step that fails between two layers is noticed at the next one, whatever layer it failed in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvhive.cache.attention import attach
from kvhive.cache.hive_cache import HiveCache
from kvhive.model.facts import ModelFacts
from tests.support import random_ids, read, tiny, tiny_llama


class Failure(Exception):
    """Stands for running out of memory, or an interrupt."""


def fail_in(module: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Let the module fail when it is called."""

    def fail(*arguments: object) -> None:
        raise Failure

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("part", ["mlp", "o_proj", "self_attn"])
@pytest.mark.parametrize("fresh", [1, 7])
def test_the_next_step_says_that_one_failed(place: int, part: str, fresh: int) -> None:
    model = tiny_llama()
    cache = HiveCache.for_model(model, "h2o@24")
    read(model, cache, random_ids(1, 40), 40)
    layer = model.model.layers[place]
    hook = fail_in(layer.self_attn.o_proj if part == "o_proj" else getattr(layer, part))
    with pytest.raises(Failure):
        model(random_ids(1, fresh), past_key_values=cache)
    hook.remove()
    whole = (place, part) in {(1, "mlp"), (1, "o_proj")}  # every layer of the cache had its turn
    unbegun = (place, part) == (0, "self_attn")
    if whole or unbegun:
        model(random_ids(1, 1), past_key_values=cache)
        return
    with pytest.raises(ValueError, match=r"failed halfway.*make a new cache, or call reset\(\)"):
        model(random_ids(1, 1), past_key_values=cache)
    cache.reset()
    expected = read(model, HiveCache.for_model(model, "h2o@24"), random_ids(1, 40), 40)
    assert torch.equal(read(model, cache, random_ids(1, 40), 40), expected)


def test_a_failure_among_stock_layers_is_noticed_too() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = tiny(
        "gemma3_text", head_dim=8, sliding_window=16, layer_types=kinds, num_hidden_layers=4
    )
    cache = HiveCache.for_model(model, "h2o@24")
    read(model, cache, random_ids(1, 40), 40)
    hook = fail_in(model.model.layers[2].self_attn)
    with pytest.raises(Failure):
        model(random_ids(1, 1), past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="failed halfway"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_a_model_that_cannot_be_attached_is_left_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong, an interrupt too."""
    model = tiny("llama", "sdpa")

    def fail(model: PreTrainedModel) -> ModelFacts:
        raise error("no")

    monkeypatch.setattr("kvhive.cache.attention.facts_for", fail)
    with pytest.raises(error):
        attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_of_another_model_of_equal_shape_is_refused() -> None:
    """Its keys would be read without a word, and mean nothing."""
    mine, other = tiny_llama(seed=0), tiny_llama(seed=1)
    cache = HiveCache.for_model(mine, "h2o@24")
    HiveCache.for_model(other, "h2o@24")
    with torch.no_grad():
        mine(random_ids(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match=r"made for another LlamaForCausalLM"):
            other(random_ids(1, 1), past_key_values=cache)


def test_a_deep_copy_of_a_model_is_that_model() -> None:
    """The same weights under another name are no other model."""
    mine = tiny_llama()
    cache = HiveCache.for_model(mine, "h2o@24")
    twin = copy.deepcopy(mine)
    HiveCache.for_model(twin, "h2o@24")
    ids = random_ids(1, 31)
    with torch.no_grad():
        mine(ids[:, :30], past_key_values=cache)
        expected = mine(ids[:, 30:], past_key_values=cache.fork()).logits
        assert torch.equal(twin(ids[:, 30:], past_key_values=cache).logits, expected)


def test_a_batch_may_differ_from_what_was_announced(model: PreTrainedModel) -> None:
    """`early_initialization` reserves for a batch; the first real step decides."""
    cache = HiveCache.for_model(model, "h2o@24")
    cache.early_initialization(
        batch_size=1, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu")
    )
    ids = random_ids(2, 60)
    expected = read(model, HiveCache.for_model(model, "h2o@24"), ids, 50)
    assert torch.equal(read(model, cache, ids, 50), expected)
