"""Query-agnostic use: what survives of a context is chosen before the question, and without it.

Exactly: whatever is asked, and of whichever row of a batch, the context's survivors are the same.
And by key-value retrieval: a pair drawn at random is found no more often than the kept fraction
allows, which is shown to fail where the question does get in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.budget import Budget
from kvhive.cache.hive_cache import HiveCache
from kvhive.policies import Policy
from kvhive.policies._parts.selection import keep_top
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from tests.contract.recipes import BUDGET, SHARES, SMALL
from tests.support import kept_sets, left_padded, make_layer, random_ids, read

LENGTHS = (150, 97)
QUESTION = 9
PAIRS, ROWS, WIDTH = 60, 250, 16
CHANCE = 1e-6  # that an honest policy is refused, for other seeds than these
BLACKBOARD: list[Tensor] = []  # where a leaking policy finds the positions that will be asked for


def state(cache: HiveCache) -> list[Tensor]:
    """All that decides what survives: tokens, their keys, the policy's scores and counters."""
    held = []
    for layer in cache.hive_layers():
        slots = layer.slots
        held += [
            slots.position,
            layer.store.view()[0],
            *(slots[name] for name in layer.policy.columns),
        ]
        held += [*slots.counters.values(), *slots.state.values()]
    return [tensor.clone() for tensor in held]


def ask(model: PreTrainedModel, cache: HiveCache, mask: Tensor, seed: int) -> Tensor:
    """Feed each row a question of its own in one step; its logits."""
    ids = random_ids(len(mask), QUESTION, seed=seed)
    mask = F.pad(mask, (0, QUESTION), value=1)
    positions = (mask.cumsum(1) - 1)[:, -QUESTION:]
    logits: Tensor = model(
        ids, past_key_values=cache, attention_mask=mask, position_ids=positions
    ).logits
    return logits


def of_context(cache: HiveCache, row: int) -> list[list[list[int]]]:
    """What a row still holds of its context."""
    kept = kept_sets(cache, row)
    return [[[p for p in head if p < LENGTHS[row]] for head in layer] for layer in kept]


@torch.no_grad()
@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_no_question_reaches_the_choice(model: PreTrainedModel, recipe: str) -> None:
    ids, mask = left_padded([random_ids(length, seed=length) for length in LENGTHS])
    cache, unasked = (HiveCache.for_model(model, recipe) for _ in range(2))
    read(model, unasked, ids, max(LENGTHS), mask)
    read(model, cache, ids, max(LENGTHS), mask)
    chosen = [kept_sets(unasked, row) for row in range(2)]
    for seed in (20, 21):
        frozen, evicting = cache.fork(), cache.fork()
        with frozen.freeze():
            answer = ask(model, frozen, mask, seed)
        ask(model, evicting, mask, seed)
        for row in range(2):
            assert of_context(frozen, row) == chosen[row]
            for now, before in zip(of_context(evicting, row), chosen[row], strict=True):
                assert all(set(a) <= set(b) for a, b in zip(now, before, strict=True))
        for ours, theirs in zip(state(cache), state(unasked), strict=True):
            assert torch.equal(ours, theirs), "a question left a trace in the context's cache"
    with unasked.freeze():  # the second answer is what it would be had the first not been asked
        assert torch.equal(ask(model, unasked, mask, 21), answer)


@pytest.mark.parametrize("recipe", [*SMALL, *SHARES])
def test_a_neighbour_s_question_stays_with_it(model: PreTrainedModel, recipe: str) -> None:
    """In one batch and step, one row reads a context alone, the other a context and a question."""
    contexts = [random_ids(length, seed=length) for length in LENGTHS]
    alone = HiveCache.for_model(model, recipe)
    read(model, alone, contexts[0][None], LENGTHS[0])
    for seed in (20, 21):
        told = torch.cat([contexts[1], random_ids(QUESTION, seed=seed)])
        ids, mask = left_padded([contexts[0], told])
        batch = HiveCache.for_model(model, recipe)
        read(model, batch, ids, LENGTHS[0], mask)
        assert kept_sets(batch) == kept_sets(alone)


def retrieve(recipe: Recipe | str, aware: bool = False, chunk: int = 2 * PAIRS) -> bool:
    """Whether asked pairs survive more often than the kept fraction lets them.

    Each row is a context of random pairs, keys at even and values at odd places, of which one is
    asked for at random. A head finds it if it still holds both tokens; as no head holds more whole
    pairs than half its tokens, the mean over rows and heads is at most the fraction kept, but for
    chance (Hoeffding). aware: a question whose queries point at the pair is part of the prompt.
    """
    source = torch.Generator().manual_seed(5)
    keys, values, queries = (
        torch.randn(ROWS, heads, 2 * PAIRS, WIDTH, generator=source) for heads in (2, 2, 4)
    )
    layer = make_layer(recipe)
    source = torch.Generator().manual_seed(6)  # the questions' own
    pair = 2 * torch.randint(PAIRS, (ROWS, 1), generator=source) + torch.tensor([0, 1])
    BLACKBOARD[:] = [pair]
    if aware:
        wanted = keys.gather(2, pair[:, None, :, None].expand(-1, 2, -1, WIDTH)).sum(2)
        question = wanted.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, QUESTION, -1)
        queries, chunk = torch.cat([queries, 2 * question], 2), chunk + QUESTION
        asked = torch.randn(2, ROWS, 2, QUESTION, WIDTH, generator=source)
        keys, values = torch.cat([keys, asked[0]], 2), torch.cat([values, asked[1]], 2)
    parts = (tape.split(chunk, 2) for tape in (keys, values, queries))
    for key, value, query in zip(*parts, strict=True):
        layer.update(key, value)
        layer.attend(query, WIDTH**-0.5)
    kept = layer.slots.position
    found = (kept[..., None] == pair[:, None, None]).any(2).all(-1)
    fraction = (layer.slots.valid & (kept < 2 * PAIRS)).sum(-1) / (2 * PAIRS)
    margin = math.sqrt(math.log(1 / CHANCE) / (2 * ROWS))
    return float(found.double().mean()) > float(fraction.double().mean()) + margin


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("chunk", [2 * PAIRS, 50])
def test_retrieval_does_not_beat_the_kept_fraction(recipe: str, chunk: int) -> None:
    assert not retrieve(recipe, chunk=chunk)


@pytest.mark.parametrize("recipe", ["h2o@48", "tova@48", "snapkv(window=9)@48", "corm@48"])
def test_retrieval_beats_it_where_the_question_is_known(recipe: str) -> None:
    """So the measure does see a question that gets in."""
    assert retrieve(recipe, aware=True)
    assert not retrieve(recipe)


@dataclass(frozen=True)
class Peeking(Policy):
    """Keeps what will be asked for, known from elsewhere."""

    name = "peeking"

    def select(self, slots: Slots, budget: Tensor, score: Tensor | None) -> Tensor:
        asked = (slots.position[..., None] == BLACKBOARD[0][:, None, None]).any(-1)
        return keep_top(asked.float(), slots.valid, budget)


def test_a_leaking_policy_is_caught() -> None:
    assert retrieve(Recipe(Peeking(), Budget(tokens=BUDGET)))
