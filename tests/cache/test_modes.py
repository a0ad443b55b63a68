"""torch's modes may change from step to step: inference mode, gradients, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from tests.support import divergence, random_ids, read, tiny_llama

MODES = {
    "inference": torch.inference_mode,
    "no gradient": torch.no_grad,
    "gradient": torch.enable_grad,
}


def steps(
    model: PreTrainedModel, cache: HiveCache, modes: list[AbstractContextManager[None]]
) -> torch.Tensor:
    """A prompt and single tokens, each step in its own mode; the logits of all of them."""
    ids, parts = random_ids(1, 49 + len(modes)), []
    for number, mode in enumerate(modes):
        fresh = ids[:, :50] if number == 0 else ids[:, 49 + number : 50 + number]
        with mode:
            parts.append(model(fresh, past_key_values=cache).logits.detach().clone())
    return torch.cat(parts, 1)


@pytest.mark.parametrize("recipe", ["full", "h2o@24", "buzz@24", "kv_compress(page=4)@40"])
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("later", MODES)
def test_modes_may_change_between_steps(
    model: PreTrainedModel, recipe: str, first: str, later: str
) -> None:
    """A prompt read in inference mode must not bind what follows to it."""
    expected = steps(
        model, HiveCache.for_model(model, recipe), [torch.no_grad() for _ in range(12)]
    )
    cache = HiveCache.for_model(model, recipe)
    mixed = [MODES[first](), *(MODES[later]() for _ in range(11))]
    assert torch.equal(steps(model, cache, mixed), expected)
    cache.fork()  # nothing held hangs on a graph


@pytest.mark.parametrize("recipe", ["full", "streaming_llm@40", "snapkv@40"])
def test_autocast_may_leave_keys_and_values_of_two_dtypes(recipe: str) -> None:
    """Rotary embeddings return float32 there."""
    model = tiny_llama()
    plain, mixed = (HiveCache.for_model(model, recipe) for _ in range(2))
    expected = read(model, plain, random_ids(1, 70), 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = read(model, mixed, random_ids(1, 70), 60)
    assert divergence(given.float()[:, :60], expected[:, :60]) < 0.05


def test_autocast_leaves_scores_in_full_precision() -> None:
    """Projections run in bfloat16; logits, votes and softmax do not."""
    model = tiny_llama()
    plain, mixed = (HiveCache.for_model(model, "h2o@40") for _ in range(2))
    expected = read(model, plain, random_ids(1, 90), 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = read(model, mixed, random_ids(1, 90), 60)
    assert mixed.hive_layers()[0].slots["score"].dtype == torch.float32
    assert divergence(given.float()[:, :60], expected[:, :60]) < 0.05
    total = float(mixed.hive_layers()[0].slots["score"].sum())
    assert total <= 90 * 4 * (1 + 1e-3)


def test_a_gradient_through_the_cache_is_refused() -> None:
    """Better than the wrong one: evicted tokens and detached keys have none."""
    model = tiny_llama()
    cache = HiveCache.for_model(model, "h2o@24")
    loss = model(random_ids(1, 40), past_key_values=cache).logits.sum()
    with pytest.raises(ValueError, match=r"no gradient flows through a HiveCache.*use_cache=False"):
        loss.backward()


def test_gradients_without_a_cache_still_flow() -> None:
    model, stock = tiny_llama(), tiny_llama()
    HiveCache.for_model(model, "h2o@24")
    for one in (model, stock):
        one(random_ids(1, 40), use_cache=False).logits.square().sum().backward()
    pairs = zip(model.parameters(), stock.parameters(), strict=True)
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_a_recorded_past_can_be_forked_with_gradients_on(model: PreTrainedModel) -> None:
    """What waits for `crop` is detached too."""
    cache = HiveCache.for_model(model, "h2o@24")
    cache.activate_past_recording()
    with torch.enable_grad():
        model(random_ids(1, 40), past_key_values=cache)
        model(random_ids(1, 4), past_key_values=cache)
    twin = cache.fork()
    for one in (cache, twin):
        one.crop(-2)
        assert one.get_seq_length() == 42
