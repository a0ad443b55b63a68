"""Rows of a batch: each goes its own way, whatever its neighbours are and wherever it is moved."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.hive_cache import HiveCache
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from tests.contract.recipes import (
    LARGE_SHARES,
    SHARES,
    SMALL,
    fullest,
    with_budget,
    with_slack,
)
from tests.support import Feeder, divergence, kept_sets, left_padded, random_ids, read

LENGTHS = (190, 101, 73)
DECODED = 40
RAGGED = [
    *SMALL,
    *LARGE_SHARES,
    *(with_slack(recipe, 12) for recipe in [*LARGE_SHARES, *with_budget(96)] if "@" in recipe),
]
ROTATION = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.03]))


def without_neighbours(recipe: str | Recipe) -> Recipe:
    """Scores not pooled over neighbouring slots: in its turn, padding is such a neighbour."""
    parsed = Recipe.parse(recipe)
    knobs = {f.name: 1 for f in fields(parsed.policy) if f.name in ("pool", "kernel")}
    return replace(parsed, policy=replace(parsed.policy, **knobs))


def held(feeder: Feeder, row: int) -> list[list[int]]:
    """The positions each head of a row holds."""
    return [[p for p in head.tolist() if p >= 0] for head in feeder.layer.slots.position[row]]


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_a_row_of_a_padded_batch_is_as_it_is_alone(model: PreTrainedModel, recipe: str) -> None:
    texts = [random_ids(length + DECODED, seed=length) for length in LENGTHS]  # no token twice
    prompts = [text[:-DECODED] for text in texts]
    tails = torch.stack([text[-DECODED:] for text in texts])
    ids, mask = left_padded(prompts)
    batch = HiveCache.for_model(model, recipe)
    together = read(model, batch, torch.cat([ids, tails], 1), max(LENGTHS), mask)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        alone = HiveCache.for_model(model, recipe)
        single = read(model, alone, torch.cat([prompt, tail])[None], len(prompt))
        assert kept_sets(batch, row) == kept_sets(alone)
        assert divergence(together[row, max(LENGTHS) - len(prompt) :], single[0]) < 1e-5


@pytest.mark.parametrize("recipe", RAGGED, ids=str)
def test_turns_of_unequal_length_are_as_alone(recipe: str | Recipe) -> None:
    """Several turns, each padded on the left where a row says less, so that padding lies between.

    Positions are counted in the cache, which is the harder way.
    """
    recipe = without_neighbours(recipe)
    decoding = [(1, 1, 1)] * 16
    steps = [(150, 80, 9), *decoding, (3, 20, 70), *decoding, (12, 2, 4), *decoding]
    batch = Feeder(recipe, tapes=(0, 1, 2), rotation=ROTATION)
    singles = [Feeder(recipe, tapes=(row,), rotation=ROTATION) for row in range(3)]
    for step in steps:
        together = batch.step(step)
        for row, single in enumerate(singles):
            alone = single.step(step[row])[0]
            assert torch.allclose(together[row, :, -step[row] :], alone, atol=1e-5)
    batch.check()
    for row, single in enumerate(singles):
        assert held(batch, row) == held(single, 0)


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_padding_on_the_right_does_no_harm(recipe: str) -> None:
    """The short row was padded after its tokens; from the next step on it is as it is alone."""
    batch, alone = Feeder(recipe, tapes=(0, 1)), Feeder(recipe, tapes=(1,))
    keys, values, queries = (tape[:, :, :120] for tape in (batch.keys, batch.values, batch.queries))
    real = torch.arange(120) < torch.tensor([[120], [90]])
    batch.layer.update(keys, values)
    batch.layer.attend(queries, batch.width**-0.5, real)
    batch.seen = [120, 90]
    alone.step(90)
    for _ in range(30):
        assert torch.allclose(batch.step(1)[1], alone.step(1)[0], atol=1e-5)
    assert held(batch, 1) == held(alone, 0)
    batch.check()


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_reordered_rows_continue_as_their_source(recipe: str) -> None:
    feeder = Feeder(recipe, tapes=(0, 1, 2))
    feeder.step([90, 30, 71])
    for _ in range(30):
        feeder.step(1)
    before = [held(feeder, row) for row in range(3)]
    order = [2, 0, 0, 1]
    move(feeder, order)
    assert [held(feeder, row) for row in range(4)] == [before[row] for row in order]
    feeder.check()
    twin = Feeder(recipe, tapes=(2,))
    twin.step(71)
    for _ in range(30):
        twin.step(1)
    for _ in range(40):
        assert torch.allclose(feeder.step(1)[0], twin.step(1)[0], atol=1e-5)
    feeder.check()
    assert held(feeder, 0) == held(twin, 0)


def move(feeder: Feeder, order: list[int]) -> None:
    """Reorder the layer and the tapes alike."""
    feeder.layer.reorder_cache(torch.tensor(order))
    for name in ("keys", "values", "queries"):
        setattr(feeder, name, getattr(feeder, name)[order])
    feeder.seen = [feeder.seen[row] for row in order]


@pytest.mark.parametrize("recipe", SMALL)
def test_rows_can_be_repeated_and_selected(recipe: str) -> None:
    feeder = Feeder(recipe, tapes=(0, 1))
    feeder.step([90, 60])
    one, other = held(feeder, 0), held(feeder, 1)
    feeder.layer.batch_repeat_interleave(2)
    assert [held(feeder, row) for row in range(4)] == [one, one, other, other]
    feeder.layer.batch_select_indices(torch.tensor([False, True, True, False]))
    assert [held(feeder, row) for row in range(2)] == [one, other]
    feeder.layer.batch_select_indices(torch.tensor([1]))
    assert held(feeder, 0) == other
    assert feeder.layer.slots.batch == feeder.layer.store.keys.shape[0] == 1


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
@pytest.mark.parametrize("padded", [False, True])
def test_beams_run_within_the_budget(model: PreTrainedModel, recipe: str, padded: bool) -> None:
    ids, mask = left_padded([random_ids(80), random_ids(49 if padded else 80, seed=1)])
    cache = HiveCache.for_model(model, recipe)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=20,
        num_beams=3,
        do_sample=False,
    )
    assert out.shape == (2, 100)
    report = cache.report()
    assert report.kept.shape[1] == 6
    assert report.tokens_seen == 99
    budget = cache.recipe.budget
    if budget is not None and cache.recipe.policy.sizing.decoding:
        policy = cache.recipe.policy
        assert fullest(recipe, report.kept) <= policy.sizing.peak(
            budget.resolve(80, policy.sizing.least)
        )


@pytest.mark.parametrize("chunk", [7, 20, 64])
@pytest.mark.parametrize("recipe", ["full", "h2o@100000", "streaming_llm@40", "h2o@40", "corm@60"])
def test_chunks_may_come_with_the_mask_of_the_whole_prompt(
    model: PreTrainedModel, stock: PreTrainedModel, recipe: str, chunk: int
) -> None:
    """What lies behind the tokens fed so far is not looked at; the stock cache reads it so too."""
    ids, mask = left_padded([random_ids(60), random_ids(40, seed=1)])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    whole, cut = (HiveCache.for_model(model, recipe) for _ in range(2))
    theirs = DynamicCache(config=stock.config)
    given, expected, plain = [], [], []
    with torch.no_grad():
        for start in range(0, 60, chunk):
            stop = min(start + chunk, 60)
            step = {"input_ids": ids[:, start:stop], "position_ids": position[:, start:stop]}
            given.append(model(**step, attention_mask=mask, past_key_values=whole).logits)
            seen = mask[:, :stop]
            expected.append(model(**step, attention_mask=seen, past_key_values=cut).logits)
            plain.append(stock(**step, attention_mask=seen, past_key_values=theirs).logits)
    assert torch.equal(torch.cat(given, 1), torch.cat(expected, 1))
    assert whole.report().seen.tolist() == [60, 40]
    if Recipe.parse(recipe).budget is None or recipe.endswith("@100000"):
        real = mask.bool()
        assert divergence(torch.cat(given, 1)[real], torch.cat(plain, 1)[real]) < 1e-5
