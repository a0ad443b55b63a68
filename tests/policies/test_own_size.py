"""Methods that size themselves: rows of a batch go their own way, and the cache follows them."""

from __future__ import annotations

import pytest
import torch

from kvhive.cache.hive_cache import HiveCache
from tests.support import Feeder, kept_sets, left_padded, random_ids, read, tiny_llama

RECIPES = [
    "corm",
    "corm(history=9, recent=4)",
    "corm(history=12, recent=5, threshold=cache, cap=30, every=3)",
    "scissorhands_percentile(history=16, recent=4, start=20)",
    "scissorhands_percentile(history=16, recent=4, start=20, decode=none)",
    "cascading(sink=2, places=7, eager_fill=false)",
    "cascading(sink=3, places=5, levels=2, strides=[1, 3], reduce=median)",
]


def held(feeder: Feeder, row: int) -> list[list[int]]:
    """The positions each head of a row holds."""
    return [[p for p in head if p >= 0] for head in feeder.layer.slots.position[row].tolist()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_turns_of_unequal_length_are_as_alone(recipe: str) -> None:
    """Padding in front and between, and rows that say nothing for a while."""
    turns = [(90, 40, 9), *[(1, 1, 1)] * 20, (3, 20, 50), (12, 0, 4), *[(1, 1, 1)] * 10]
    batch = Feeder(recipe, tapes=(0, 1, 2))
    singles = [Feeder(recipe, tapes=(row,)) for row in range(3)]
    for turn in turns:
        together = batch.step(turn)
        for row, single in enumerate(singles):
            if turn[row]:
                alone = single.step(turn[row])[0]
                assert torch.allclose(together[row, :, -turn[row] :], alone, atol=1e-5)
                assert held(batch, row) == held(single, 0)
    batch.check()
    assert any(len(head) < batch.seen[0] for head in held(batch, 0)), "nothing was dropped"


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_may_be_reordered(recipe: str) -> None:
    """Beams continue as the row they came from."""
    batch, twin = Feeder(recipe, tapes=(0, 1)), Feeder(recipe, tapes=(1,))
    for feeder in (batch, twin):
        feeder.step(50)
        feeder.step(1)
    batch.layer.reorder_cache(torch.tensor([1, 1]))
    batch.keys, batch.values, batch.queries = (
        tape[[1, 1]] for tape in (batch.keys, batch.values, batch.queries)
    )
    for _ in range(12):
        assert torch.allclose(batch.step(1)[0], twin.step(1)[0], atol=1e-5)
    assert held(batch, 0) == held(batch, 1) == held(twin, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_a_model(recipe: str) -> None:
    """A padded batch through a whole model, its report, and the memory that was given back."""
    model = tiny_llama()
    prompts = [random_ids(length, seed=length) for length in (80, 45)]
    ids, mask = left_padded(prompts)
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, torch.cat([ids, random_ids(2, 20)], 1), 80, mask)
    assert cache.report().seen.tolist() == [100, 65]
    for row, prompt in enumerate(prompts):
        alone = HiveCache.for_model(model, recipe)
        tail = random_ids(2, 20)[row]
        read(model, alone, torch.cat([prompt, tail])[None], len(prompt))
        assert kept_sets(cache, row) == kept_sets(alone)
    assert int(cache.report().kept.min()) < 65
