"""Hive against an oracle in plain Python: ranks over all tokens of all heads, and their mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.kernels import Rows
from kvhive.policies._parts.cells import neighbours
from kvhive.policies._parts.fading import add_squares
from kvhive.policies._parts.ranking import shares_below
from kvhive.policies.hive import Hive, ranked
from kvhive.recipe import Recipe
from kvhive.slots import Slots
from kvhive.step import Step
from tests.support import kept_sets, left_padded, random_ids

from .rig import rows_of, small_numbers
from .rows import in_blocks

LAYERS, ROWS, HEADS = 3, 2, 2


def filled(policy: Hive, seed: int) -> list[Slots]:
    """Layers of different lengths, the second row padded, with few values: ties abound."""
    layers = []
    for layer, length in enumerate((17, 9, 12)):
        slots = Slots(ROWS, HEADS, policy.columns, policy.counters, torch.device("cpu"))
        position = torch.arange(length).expand(ROWS, -1).clone()
        position[1] = (position[1] - 4).clamp_min(-1)
        slots.append(rows_of(position), length)
        for place, name in enumerate(policy.columns):
            numbers = small_numbers(9 * seed + 3 * layer + place, ROWS, HEADS, length)
            slots[name].copy_(numbers)  # of empty slots too, where there is anything in practice
        layers.append(slots)
    return layers


def slow_rank(value: float, all_values: list[float]) -> float:
    """The share of all that is smaller."""
    return sum(other < value for other in all_values) / len(all_values)


def slow_scores(policy: Hive, layers: list[Slots], row: int) -> list[list[dict[int, float]]]:
    """`[layer][head]`: the score of each position held."""
    votes: list[list[dict[int, float]]] = []
    given: list[list[dict[int, float]]] = []
    for slots in layers:
        votes.append([])
        given.append([])
        for head in range(HEADS):
            position = slots.position[row, head].tolist()
            place = {p: i for i, p in enumerate(position) if p >= 0}
            raw = {p: float(slots["votes"][row, head, i]) for p, i in place.items()}
            half = policy.pool // 2
            votes[-1].append(
                {p: max(raw.get(q, 0.0) for q in range(p - half, p + half + 1)) for p in raw}
            )
            column = slots["repeated"] if policy.reconstruct else slots["votes"] * 0
            given[-1].append({p: float(column[row, head, i]) for p, i in place.items()})
    every = [value for layer in votes for head in layer for value in head.values()]
    again = [v for layer in given for head in layer for v in head.values() if v > 0]
    scores = []
    for layer_votes, layer_given in zip(votes, given, strict=True):
        scores.append([])
        for head_votes, head_given in zip(layer_votes, layer_given, strict=True):
            score = {}
            for p, vote in head_votes.items():
                score[p] = slow_rank(vote, every)
                if head_given[p] > 0:
                    again_rank = slow_rank(head_given[p], again)
                    score[p] = policy.weight * score[p] + (1 - policy.weight) * again_rank
            if policy.cell:
                for cell in {p // policy.cell for p in score}:
                    members = [p for p in score if p // policy.cell == cell]
                    score[max(members, key=lambda p: (score[p], -p))] += 1
            scores[-1].append(score)
    return scores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "policy",
    [
        Hive(),
        Hive(pool=1),
        Hive(pool=3, reconstruct=False),
        Hive(cell=4),
        Hive(pool=3, cell=5, weight=0.2),
    ],
    ids=str,
)
def test_scores_are_the_oracles(policy: Hive, seed: int) -> None:
    layers = filled(policy, seed)
    scores = ranked([policy] * LAYERS, layers)
    for row in range(ROWS):
        slow = slow_scores(policy, layers, row)
        for slots, score, layer in zip(layers, scores, slow, strict=True):
            for head in range(HEADS):
                position = slots.position[row, head].tolist()
                ours = [
                    s for s, p in zip(score[row, head].tolist(), position, strict=True) if p >= 0
                ]
                assert ours == pytest.approx(list(layer[head].values()), abs=1e-6)


def test_rows_are_ranked_each_for_itself() -> None:
    scores = [torch.tensor([[[1.0, 2.0, 2.0]], [[9.0, 8.0, 7.0]]]), torch.ones(2, 1, 1)]
    among = [torch.tensor([[[True] * 3], [[True, True, False]]]), torch.ones(2, 1, 1).bool()]
    first, second = shares_below(scores, among)
    assert first[0, 0].tolist() == [0.0, 0.5, 0.5]
    assert first[1, 0, :2].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert second.flatten().tolist() == [0.0, 0.0]


def rows_from(seed: int, queries: int, tokens: int) -> Tensor:
    """Probabilities `[1, 4, queries, tokens]`."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, queries, tokens, generator=source).softmax(-1)


@pytest.mark.parametrize("last", [1, 5, 16])
def test_queries_that_come_together_count_as_one_by_one(last: int) -> None:
    slots = Slots(1, 2, {}, {}, torch.device("cpu"))
    slots.append(Step.plain(0, 30), 30)
    before = small_numbers(0, 1, 2, 30)
    together, singly = before.clone(), before.clone()
    count = max(1, last - 1)
    rows = rows_from(1, count, 30)
    add_squares(together, slots, in_blocks(rows, 3), last)
    for query in range(count):
        add_squares(singly, slots, Rows.of(rows[:, :, query : query + 1]), last)
    assert torch.allclose(together, singly, atol=1e-6)
    keep = 1 - 1 / last
    slow = before * keep**count if last > 1 else before * 0
    for query in range(count):
        squares = rows[0, :, query].square().view(2, 2, 30).sum(1)
        slow[0] += squares * keep ** (count - 1 - query)
    assert torch.allclose(together, slow, atol=1e-6)


def test_a_step_of_as_many_queries_begins_anew() -> None:
    slots = Slots(1, 2, {}, {}, torch.device("cpu"))
    slots.append(Step.plain(0, 30), 30)
    old, new = small_numbers(0, 1, 2, 30) + 1, torch.zeros(1, 2, 30)
    for votes in (old, new):
        add_squares(votes, slots, Rows.of(rows_from(2, 8, 30)), 8)
    assert torch.equal(old, new)


def test_runs_of_neighbours() -> None:
    slots = Slots(1, 1, {}, {}, torch.device("cpu"))
    slots.append(rows_of(torch.tensor([[-1, 0, 1, 2, 3, 4, 5, 6]])), 8)
    assert neighbours(slots, 3)[0, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 3]


def test_cells_keep_one_of_every_run(model: PreTrainedModel) -> None:
    """With room for all of them, the best of every cell stays in every head."""
    cache = HiveCache.for_model(model, "hive(cell=8, window=8, chunk=64)@60/uniform")
    cache.read(random_ids(1, 200))
    for head in (head for layer in kept_sets(cache) for head in layer):
        assert {place // 8 for place in head} == set(range(25))
        assert len(head) == 60


def test_recipes_say_what_differs() -> None:
    assert str(Recipe.parse("hive@0.4")) == "hive@0.4"
    assert str(Recipe.parse("hive@0.4/global")) == "hive@0.4"
    assert str(Recipe.parse("hive@0.4/uniform")) == "hive@0.4/uniform"
    assert Recipe.parse("hive@0.4").allocation.compete == "model"
    assert Recipe.parse("hive(reconstruct=false)@0.4").policy.reconstruction is None
    with pytest.raises(ValueError, match=r"hive: pool must be an odd number, got 4"):
        Recipe.parse("hive(pool=4)@0.4")


@pytest.mark.parametrize("recipe", ["hive(window=8)@50", "hive(window=8)@50/uniform"])
def test_a_padded_row_lives_as_it_does_alone(model: PreTrainedModel, recipe: str) -> None:
    """Turns with their passes, and decoding between them."""
    texts = [[random_ids(n, seed=n + t) for n in (90, 41)] for t in range(2)]
    tokens = random_ids(20, 1)
    batch, masks = HiveCache.for_model(model, recipe), []
    alone = [HiveCache.for_model(model, recipe) for _ in range(2)]
    for turn in texts:
        ids, mask = left_padded(turn)
        masks.append(mask)
        batch.read(ids, torch.cat(masks, 1))
        for cache, one in zip(alone, turn, strict=True):
            cache.read(one[None])
        for token in tokens:
            masks.append(torch.ones(2, 1, dtype=torch.int64))
            batch.read(token.expand(2, 1), torch.cat(masks, 1))
            for cache in alone:
                cache.read(token[None])
        for row, cache in enumerate(alone):
            assert kept_sets(batch, row) == kept_sets(cache)


def test_what_was_decoded_ranks_by_attention_alone(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "hive(window=8)@60")
    cache.read(random_ids(1, 100))
    for token in random_ids(1, 30, seed=3)[0]:
        cache.read(token.view(1, 1))
    for layer in cache.hive_layers():
        decoded = layer.slots.position >= 100
        assert not bool(layer.slots["repeated"][decoded].any())
        assert bool((layer.slots["repeated"][~decoded & layer.slots.valid] > 0).all())
