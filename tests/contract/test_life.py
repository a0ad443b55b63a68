"""The life of a cache: frozen, forked, reset, and what it costs in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.room import HEADROOM
from tests.contract.recipes import LARGE_SHARES, SELECTIVE, SHARES, SMALL, fullest
from tests.support import Feeder, kept_sets, random_ids, read, tensors

PROMPT = 150


def state(feeder: Feeder) -> list[Tensor]:
    """All that a layer holds, as copies."""
    slots, store = feeder.layer.slots, feeder.layer.store
    held = [slots.position, *store.view(), *slots.counters.values()]
    held += [slots[name] for name in feeder.layer.policy.columns]
    return [tensor.clone() for tensor in held]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two states are equal in every bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", SMALL)
def test_a_frozen_cache_loses_nothing(model: PreTrainedModel, recipe: str) -> None:
    ids = random_ids(1, PROMPT + 40)
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, ids[:, :PROMPT], PROMPT)
    before = kept_sets(cache)
    with cache.freeze():
        read(model, cache, ids[:, PROMPT:], 25)
        added = list(range(PROMPT, PROMPT + 40))
        assert kept_sets(cache) == [[head + added for head in layer] for layer in before]
    read(model, cache, random_ids(1, 1), 1)
    policy, budget = cache.recipe.policy, cache.recipe.budget
    if budget is not None and policy.sizing.decoding:
        kept = cache.report().kept
        assert fullest(cache.recipe, kept) <= policy.sizing.peak(budget.resolve(PROMPT, 1))
    assert cache.get_seq_length() == PROMPT + 41


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_a_fork_goes_its_own_way(model: PreTrainedModel, recipe: str) -> None:
    ids = random_ids(1, PROMPT + 16)
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, ids[:, :PROMPT], PROMPT)
    untouched, fork = cache.fork(), cache.fork()
    read(model, fork, random_ids(1, 40, seed=5), 30)
    assert kept_sets(cache) == kept_sets(untouched)
    assert fork.get_seq_length() == PROMPT + 40
    ours = read(model, cache, ids[:, PROMPT:], 1)
    theirs = read(model, untouched, ids[:, PROMPT:], 1)
    assert torch.equal(ours, theirs)
    assert kept_sets(cache) == kept_sets(untouched)


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_reset_begins_anew(recipe: str) -> None:
    used, fresh = Feeder(recipe), Feeder(recipe)
    used.step(90)
    for _ in range(10):
        used.step(1)
    used.layer.reset()
    assert used.layer.nbytes == 0
    assert used.layer.get_seq_length() == 0
    used.seen = [0]
    for feeder in (used, fresh):
        feeder.step(PROMPT)
        for _ in range(40):
            feeder.step(1)
    assert same(state(used), state(fresh))


@pytest.mark.parametrize("recipe", [*SELECTIVE, *LARGE_SHARES])
def test_room_can_be_made_ahead(recipe: str) -> None:
    feeder = Feeder(recipe)
    feeder.step(PROMPT)
    policy, budget = feeder.layer.policy, feeder.recipe.budget
    assert budget is not None
    most = policy.sizing.peak(budget.resolve(PROMPT, policy.sizing.least))
    turn = most - policy.sizing.least
    feeder.layer.make_room(turn)
    kept = feeder.layer.slots.count[None]
    assert fullest(recipe, kept) <= max(most - turn, policy.sizing.peak(policy.sizing.least))
    feeder.layer.make_room(10_000)
    feeder.step(40)
    feeder.step(1)
    feeder.check()


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_bytes_reported_are_all_there_are(recipe: str, rows: int) -> None:
    feeder = Feeder(recipe, tapes=range(rows))
    for tokens in ([PROMPT, 70][:rows], *[[1] * rows] * 15, [20, 3][:rows]):
        feeder.step(tokens)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors(feeder.layer, set())
        }
        shared = feeder.layer.progress.nbytes
        assert feeder.layer.nbytes + shared == sum(storages.values())


@pytest.mark.parametrize("recipe", SELECTIVE)
def test_memory_shrinks_with_the_prompt(recipe: str) -> None:
    small, full = Feeder(recipe), Feeder("full")
    small.step(900)
    full.step(900)
    layer = small.layer
    budget = layer.progress.limits.budget
    most = layer.policy.sizing.peak(budget.resolve(900, 1)) if budget else 900
    assert int(layer.slots.count.float().mean()) <= most
    spare = layer.slots.room - layer.slots.length
    assert 0 <= spare <= HEADROOM
    assert layer.store.room == layer.slots.room
    assert layer.store.nbytes <= full.layer.store.nbytes * layer.store.room / 900
    assert layer.nbytes < full.layer.nbytes / 2
    for _ in range(60):
        small.step(1)
    assert layer.store.room - layer.slots.length <= HEADROOM
