"""KVzip: the best-repeated tokens of all heads stay (what a pass gives: `test_reconstruction`)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.reconstruction import LEAD
from kvhive.policies.kvzip import KVzip
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from kvhive.step import Step
from tests.support import kept_sets, random_ids

from .rig import NOTHING_TO_SCORE, kept

TOKENS, HEADS = 12, 2


def slots_with(repeated: list[float]) -> Slots:
    """Two heads alike."""
    policy = KVzip()
    slots = Slots(1, HEADS, policy.columns, policy.counters, torch.device("cpu"))
    slots.append(Step.plain(0, len(repeated)), len(repeated))
    slots["repeated"].copy_(torch.tensor(repeated).expand(1, HEADS, -1))
    return slots


def held(mask: Tensor) -> list[int]:
    """Places kept in the first head."""
    return mask[0, 0].nonzero()[:, 0].tolist()


def test_the_best_repeated_stay_beside_the_sinks() -> None:
    slots = slots_with([0.0, 0.1, 0.9, 0.2, 0.8, 0.1, 0.8, 0.3])
    budget = torch.full((1, HEADS), 4)
    assert held(kept(KVzip(sink=1), slots, budget)) == [0, 2, 4, 6]
    assert held(kept(KVzip(sink=0), slots, budget)) == [2, 4, 6, 7]


def test_what_was_never_repeated_goes_first_and_the_oldest_of_it_before_the_newest() -> None:
    slots = slots_with([0.5, 0.1, 0.0, 0.0, 0.2, 0.0, 0.0])
    budget = torch.full((1, HEADS), 5)
    assert held(kept(KVzip(sink=0), slots, budget)) == [0, 1, 4, 5, 6]


def test_defaults_are_the_papers() -> None:
    policy = KVzip()
    assert (policy.chunk, LEAD) == (2048, 8)
    assert not policy.sizing.decoding
    assert str(Recipe.parse("kvzip@0.4")) == "kvzip@0.4"
    assert str(Recipe.parse("kvzip@0.4").allocation) == "global(floor=0.0)"
    assert str(Recipe.parse("kvzip@0.4/uniform")) == "kvzip@0.4/uniform"
    assert Recipe.parse("kvzip@0.4/global(floor=0.0)") == Recipe.parse("kvzip@0.4")


def test_one_threshold_for_all_heads_of_the_model(model: PreTrainedModel) -> None:
    """What stays are the best of all heads, by scores that a cache which evicts nothing holds."""
    ids = random_ids(1, 200)
    whole = HiveCache.for_model(model, "kvzip(chunk=64)@100000")
    whole.read(ids)
    scores = torch.stack([layer.slots["repeated"] for layer in whole.hive_layers()])[:, 0]
    scores[..., :4] = float("inf")
    places = scores.flatten().argsort(descending=True)[: 60 * scores[..., 0].numel()]
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[places] = True
    expected = expected.view_as(scores)
    cache = HiveCache.for_model(model, "kvzip(chunk=64)@60")
    cache.read(ids)
    assert kept_sets(cache) == [
        [head.nonzero()[:, 0].tolist() for head in layer] for layer in expected
    ]


def test_decoding_evicts_nothing_and_a_turn_evicts_again(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "kvzip@60")
    cache.read(random_ids(1, 150))
    assert cache.report().tokens_kept == 60
    for token in random_ids(1, 9)[0]:
        cache.read(token.view(1, 1))
    assert cache.report().tokens_kept == 69
    cache.read(random_ids(1, 30, seed=5))
    assert cache.report().tokens_kept == 60


def test_without_a_pass_the_newest_stay_in_every_head() -> None:
    """As in a bare `generate`: no head is emptied for another."""
    slots = [slots_with([0.0] * TOKENS) for _ in range(3)]
    helds, policy = [NOTHING_TO_SCORE] * 3, KVzip()
    scores = KVzip.score_all([policy] * 3, slots, helds)
    for score in scores:
        assert score is not None
        assert score[0, 0].tolist() == [float(place - TOKENS) for place in range(TOKENS)]
