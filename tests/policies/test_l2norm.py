"""L2 norm: the shortest keys of each head stay, whatever else is true of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.hive_cache import HiveCache
from kvhive.policies import Policy
from kvhive.policies._parts.selection import joint_ranks
from kvhive.policies.full import Full
from kvhive.policies.l2norm import L2Norm
from kvhive.rope import Rotation
from tests.support import Feeder, random_ids, read

from ..conformance.playing import feed, make_layer
from .dense import check_dense_decoding


def random_keys(seed: int, *shape: int) -> Tensor:
    """float32 keys."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shortest(keys: Tensor, budget: int, recent: int) -> list[int]:
    """The positions to keep of one head's keys `[n, d]`; ties: the older."""
    n = len(keys)
    window = list(range(max(0, n - recent), n))
    norms = [sum(x * x for x in key) ** 0.5 for key in keys.tolist()]
    older = sorted(range(n - len(window)), key=lambda p: (norms[p], p))
    return sorted(window + older[: budget - len(window)])


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize(("n", "budget"), [(9, 4), (40, 8), (40, 39), (64, 20)])
def test_a_prompt_keeps_the_shortest_keys(n: int, budget: int, recent: int) -> None:
    keys = random_keys(n, 2, 3, n, 8)
    held = feed(make_layer(L2Norm(recent=recent), budget), keys)
    for row in range(2):
        for head in range(3):
            assert held[row, head].tolist() == shortest(keys[row, head], budget, recent)


@pytest.mark.parametrize("policy", [L2Norm(), L2Norm(recent=4)])
def test_a_stream_keeps_the_shortest_of_what_is_there(policy: L2Norm) -> None:
    """Token by token: without a window the newest may go at once, and then it is the longest."""
    keys = random_keys(1, 1, 2, 60, 8)
    layer = make_layer(policy, 12)
    held: list[list[int]] = [[], []]
    for place in range(60):
        now = feed(layer, keys[:, :, place : place + 1])[0].tolist()
        for head in range(2):
            there = [*held[head], place]
            best = shortest(keys[0, head, there], 12, policy.recent)
            held[head] = [there[i] for i in best]
        assert now == held


def test_norms_of_those_kept_do_not_exceed_those_dropped() -> None:
    keys = random_keys(2, 1, 4, 100, 16)
    held = feed(make_layer(L2Norm(), 30), keys)[0].long()
    norms = keys[0].norm(dim=-1)
    kept = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, held, True)
    longest = norms.masked_fill(~kept, 0).amax(-1)
    assert bool((longest < norms.masked_fill(kept, 1e9).amin(-1)).all())


@pytest.mark.parametrize("change", ["longer", "turned"])
def test_scale_and_rotation_do_not_matter(change: str) -> None:
    keys = random_keys(3, 1, 2, 50, 8)
    rotation = Rotation(torch.tensor([1.0, 0.2, 0.05, 0.01]))
    shift = torch.arange(50).expand(1, 2, 50)
    other = 7.5 * keys if change == "longer" else rotation.rotate(keys, shift, 50)
    one, two = (feed(make_layer(L2Norm(), 20), each) for each in (keys, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_pieces_of_a_prompt_keep_what_the_whole_keeps(chunk: int) -> None:
    """For given keys: the best of the best so far and the new."""
    keys = random_keys(4, 1, 2, 64, 8)
    whole = feed(make_layer(L2Norm(), 16), keys)
    layer = make_layer(L2Norm(), 16)
    for piece in keys.split(chunk, dim=2):
        held = feed(layer, piece)
    assert torch.equal(held, whole)


def test_equal_norms_keep_the_older() -> None:
    """Also where they differ by a rounding, as those of one word at several places do."""
    keys = torch.ones(1, 1, 12, 4)
    keys[:, :, ::2] *= 1 + 2e-7
    keys[:, :, 5] = 0.5
    held = feed(make_layer(L2Norm(), 4), keys)
    assert held[0, 0].tolist() == [0, 1, 2, 5]


def test_joint_ranks() -> None:
    """Runs of near values have one rank; a chain of small steps is one run."""
    value = torch.tensor([[[3.0, 1.0, 1.0001, 5.0, 1.0002, 3.0001, 9.0]]])
    assert joint_ranks(value, 1e-3).tolist() == [[[1, 0, 0, 2, 0, 1, 3]]]
    assert joint_ranks(value, 0.0).tolist() == [[[3, 0, 1, 5, 2, 4, 6]]]


def test_a_prompt_only_form() -> None:
    """`decode="none"` appends, and compresses again with the next prompt."""
    feeder = Feeder("l2norm(decode=none)@20")
    feeder.step(50)
    for decoded in range(1, 30):
        feeder.step(1)
        assert feeder.layer.slots.length == 20 + decoded
    feeder.step(5)
    assert feeder.layer.slots.length == 20


def test_answers_are_dense_attention_over_the_kept(
    model: PreTrainedModel, stock: PreTrainedModel
) -> None:
    check_dense_decoding(model, stock, "l2norm(decode=none)@25")


def test_skipped_layers_are_left_whole(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """All their tokens, bit by bit, and no budget is spent on them."""
    ids = random_ids(1, 120, seed=1)
    cache, whole = HiveCache.for_model(model, "l2norm(skip_layers=[0])@30"), DynamicCache()
    read(model, cache, ids, 100)
    read(stock, whole, ids[:, :100], 100)
    first, second = cache.hive_layers()
    assert cache.report().kept.flatten().tolist() == [120, 120, 30, 30]
    assert torch.equal(first.store.keys[:, :, :100], whole.layers[0].keys)
    assert second.slots.length == 30
    padded = HiveCache.for_model(model, "l2norm(skip_layers=[0])@30")
    mask = torch.ones(1, 120, dtype=torch.int64)
    mask[:, :40] = 0
    read(model, padded, ids, 100, mask)
    assert padded.report().kept.flatten().tolist() == [80, 80, 30, 30]


def test_layers_to_skip() -> None:
    """Named from 0; the others keep the policy as it is."""
    policy = L2Norm(skip_layers=(0, 2))
    kinds: list[Policy] = [policy.for_layer(layer, 4, 20) for layer in range(4)]
    assert kinds == [Full(), policy, Full(), policy]
    with pytest.raises(ValueError, match="skip_layers must name layers below 2"):
        policy.for_layer(0, 2, 20)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"recent": -1}, "l2norm: recent must be at least 0, got -1"),
        ({"skip_layers": (0, -1)}, "l2norm: skip_layers must be at least 0, got -1"),
    ],
)
def test_bad_knobs(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2Norm(**knobs)  # type: ignore[arg-type]
