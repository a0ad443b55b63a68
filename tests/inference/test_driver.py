"""The driver calls the model as a plain call does, and keeps what was wanted of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.driver import Driver, chunks
from kvhive.inference.generation import decode, read
from kvhive.model.forward import forward
from tests.support import kept_sets, random_ids, tiny_llama

RECIPES = ["full", "h2o@40", "streaming_llm@30"]


@pytest.mark.parametrize("keep", [1, 3, 20])
def test_a_step_is_a_plain_call(keep: int):
    model, ids = tiny_llama(), random_ids(2, 20)
    logits = forward(model, DynamicCache(), ids, keep)
    with torch.no_grad():
        whole = model(ids, past_key_values=DynamicCache(), logits_to_keep=keep).logits
    assert torch.equal(logits, whole)
    assert logits.shape[:2] == (2, keep)
    assert not logits.requires_grad


def test_padding_reaches_the_model():
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 12)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 12])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = forward(model, DynamicCache(), ids, 4)
    assert torch.allclose(forward(model, DynamicCache(), padded, 4, mask, positions), alone)


class AllLogits(PreTrainedModel):
    """A model that cannot leave logits out."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())

    def forward(
        self, input_ids: Tensor, past_key_values: object, use_cache: bool
    ) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=input_ids[..., None].float())  # type: ignore[arg-type]


def test_a_model_without_a_choice_of_logits():
    logits = forward(AllLogits(), DynamicCache(), torch.tensor([[5, 6, 7]]), 2)
    assert logits[0, :, 0].tolist() == [6, 7]


def test_caches_step_together_as_alone():
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 60)
    driver, step = Driver(model), random_ids(4, 1, seed=1)
    caches = [HiveCache.for_model(model, recipe) for recipe in RECIPES]
    for cache in caches:
        read(model, cache, ids[0].tolist())
    caches[1].batch_repeat_interleave(2)
    copies = [cache.fork() for cache in caches]
    together = driver.step_together(caches, [1, 2, 1], step)
    parts = zip(copies, step.split([1, 2, 1]), strict=True)
    alone = torch.cat([driver.step(cache, rows) for cache, rows in parts])
    assert torch.allclose(together, alone)


def test_a_shared_step_is_followed_by_the_pass_of_each():
    model, ids = tiny_llama(dtype=torch.float64), random_ids(1, 60)
    driver, turn = Driver(model), random_ids(1, 20, seed=1)
    caches = [HiveCache.for_model(model, recipe) for recipe in (*RECIPES, "hive(window=8)@40")]
    for cache in caches:
        read(model, cache, ids[0].tolist())
    copies = [cache.fork() for cache in caches]
    together = driver.step_together(caches, [1] * 4, turn.expand(4, -1))
    alone = torch.cat([driver.step(cache, turn) for cache in copies])
    assert torch.allclose(together, alone)
    assert [kept_sets(cache) for cache in caches] == [kept_sets(cache) for cache in copies]


@pytest.mark.parametrize(
    ("length", "size", "steps"),
    [
        (0, None, []),
        (0, 3, []),
        (7, None, [(0, 7)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (2, 5, [(0, 2)]),
    ],
)
def test_chunks(length: int, size: int | None, steps: list[tuple[int, int]]):
    assert chunks(length, size) == steps
    mirrored = [(length - stop, length - start) for start, stop in reversed(steps)]
    assert chunks(length, size, from_end=True) == mirrored


@pytest.mark.parametrize("chunk", [None, 7, 100])
def test_reading_and_decoding_are_steps(chunk: int | None):
    model, ids = tiny_llama(), random_ids(1, 30)[0].tolist()
    cache, other = (HiveCache.for_model(model, "h2o@20") for _ in range(2))
    shares: list[float] = []
    logits = read(model, cache, ids, chunk, shares.append)
    driver = Driver(model)
    for start, stop in chunks(len(ids), chunk):
        expected = driver.step(other, torch.tensor([ids[start:stop]]))[0, -1]
    assert torch.equal(logits, expected)
    assert shares[-1] == 1
    assert len(shares) == len(chunks(len(ids), chunk))
    for token, before in decode(model, cache, logits, 5):
        assert token == int(expected.argmax())
        assert torch.equal(before, expected)
        expected = driver.step(other, torch.tensor([[token]]))[0, -1]


def test_nothing_to_read():
    model = tiny_llama()
    with pytest.raises(ValueError, match="there is nothing to read: give at least 1 token id"):
        read(model, HiveCache.for_model(model, "full"), [])
    with pytest.raises(ValueError, match="prefill chunk must be at least 1 token, got 0"):
        read(model, HiveCache.for_model(model, "full"), [1], 0)
