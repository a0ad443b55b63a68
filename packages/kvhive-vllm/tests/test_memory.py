"""What is set aside beside the blocks is what slots really take."""

from __future__ import annotations

import pytest
import torch
from kvhive.cache.positions import Turning
from kvhive.rope import Rotation
from kvhive.slots import Slots
from kvhive.step import Step

from kvhive_vllm.memory import Reserve, Shape, reserve
from kvhive_vllm.recipes import read

SHAPE = Shape(layers=3, heads=8, kv_heads=2, width=64, itemsize=2, tokens=1000, requests=4)


@pytest.mark.parametrize("recipe", ["window@100", "h2o@100", "snapkv@100", "l2norm@100"])
@pytest.mark.parametrize("turned", [False, True])
def test_slots_take_what_is_set_aside_for_them(recipe: str, turned: bool) -> None:
    policy = read(recipe).policy
    turning = Turning(Rotation(torch.ones(32)) if turned else None)
    columns = {**policy.columns, **turning.columns}
    slots = Slots(SHAPE.layers, SHAPE.kv_heads, columns, {}, torch.device("cpu"))
    slots.append(Step.plain(0, SHAPE.tokens), SHAPE.tokens)
    assert slots.position.shape == (3, 2, 1000)  # written down
    taken = slots.nbytes - slots.tally.untyped_storage().nbytes()
    aside = reserve(read(recipe), SHAPE, turned).a_token * SHAPE.tokens
    if not turned:
        places = 3 * 2 * 1000 * 2  # `held.HeldPages`
        assert taken + places == aside
    else:
        assert taken <= aside <= taken + 2 * 3 * 1000 * (2 * SHAPE.width + 8)


def test_shares_add_up_to_what_there_is() -> None:
    share = Reserve(a_token=10, once=100)
    aside = share.of(1000 + 100, 90)
    assert aside == 100 + 100
    assert (1100 - aside) // 90 * (90 + 10) <= 1000
    assert share.of(50, 90) == 50


def test_queries_that_vote_are_counted() -> None:
    silent, voting = (reserve(read(one), SHAPE, False) for one in ("window@100", "h2o@100"))
    waiting = SHAPE.requests * 16 * SHAPE.layers * SHAPE.heads * SHAPE.width * SHAPE.itemsize
    rows = 4 * SHAPE.layers * SHAPE.heads * SHAPE.tokens
    assert voting.once - silent.once == waiting + rows
    whole = reserve(read("expected_attention@100"), SHAPE, False)
    assert whole.once > voting.once - rows
