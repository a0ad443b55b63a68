"""BUZZ inside a layer: groups, rows, padding, full budgets, postponed eviction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.kernels import Ask, reference
from kvhive.policies import Policy
from kvhive.policies.buzz import Buzz
from kvhive.policies.buzz_log import BuzzLog
from kvhive.step import Step

from ..conformance.playing import Player, make_layer

SIZES: dict[str, Any] = {"sink": 2, "window": 6, "threshold": 12, "stride": 3}
SCORED = [
    Buzz(**SIZES),
    Buzz(variant="fast", **SIZES),
    Buzz(prefill="streamed", **SIZES),
    BuzzLog(**SIZES),
]


def logits_of(seed: int, heads: int, tokens: int) -> Tensor:
    """float32 `[heads, tokens, tokens]`."""
    return 3 * torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", SCORED, ids=repr)
def test_repeated_query_heads_choose_as_one(policy: Policy) -> None:
    """A grouped model whose query heads repeat decides as the ungrouped one."""
    logits = logits_of(1, 2, 90)
    alone = Player(make_layer(policy, 20), 2, 90, logits)
    grouped = Player(make_layer(policy, 20), 2, 90, logits.repeat_interleave(4, dim=0))
    for fresh in [40, *[1] * 40, 10]:
        alone.advance(fresh)
        grouped.advance(fresh)
        assert torch.equal(alone.kept, grouped.kept)


@pytest.mark.parametrize("policy", SCORED, ids=repr)
def test_a_head_listens_to_its_own_group_only(policy: Policy) -> None:
    """Query heads 0-2 belong to KV head 0: other logits in heads 3-5 leave its choices alone."""
    logits, other = logits_of(2, 6, 80), logits_of(3, 6, 80)
    mixed = torch.cat([logits[:3], other[3:]])
    one, two = (Player(make_layer(policy, 20), 2, 80, rows) for rows in (logits, mixed))
    differ = False
    for fresh in [45, *[1] * 35]:
        one.advance(fresh)
        two.advance(fresh)
        assert torch.equal(one.kept[0], two.kept[0])
        differ = differ or not torch.equal(one.kept[1], two.kept[1])
    assert differ


class Text:
    """Keys, values and queries of a row of tokens: 2 KV heads, 4 query heads, width 8."""

    def __init__(self, seed: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = (2 * torch.randn(2, 2, tokens, 8, generator=generator)).unbind(0)
        self.queries = 2 * torch.randn(4, tokens, 8, generator=generator)


def feed(layer: HiveLayer, rows: list[tuple[Text, int, int]], real: Tensor | None = None) -> Tensor:
    """One step of a batch: of each row, tokens from start to stop."""
    keys, values, queries = (
        torch.stack([getattr(text, name)[:, start:stop] for text, start, stop in rows])
        for name in ("keys", "values", "queries")
    )
    layer.update(keys, values)
    return layer.attend(queries, 8**-0.5, real)


@pytest.mark.parametrize("policy", [*SCORED, Buzz(variant="no_max", **SIZES)], ids=repr)
def test_rows_of_a_padded_batch_are_as_alone(policy: Policy) -> None:
    """A row that is shorter by 17 tokens of padding: same tokens, same outputs, step by step."""
    texts, lengths, padding = [Text(4, 100), Text(5, 100)], [50, 33], 17
    batch, alone = make_layer(policy, 20), [make_layer(policy, 20) for _ in texts]
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, :padding] = False
    padded = Text(6, 100)
    for name in ("keys", "values", "queries"):
        own = getattr(texts[1], name)
        setattr(padded, name, torch.cat([getattr(padded, name)[:, :padding], own], dim=1))
    start = 0
    for fresh in [50, *[1] * 45]:
        rows = [(text, start, start + fresh) for text in (texts[0], padded)]
        out = feed(batch, rows, real if start == 0 else None)
        for row, layer in enumerate(alone):
            new = lengths[row] if start == 0 else 1
            out_alone = feed(
                layer, [(texts[row], layer.get_seq_length(), layer.get_seq_length() + new)]
            )
            torch.testing.assert_close(out[row, :, -new:], out_alone[0], atol=1e-4, rtol=1e-4)
            held = batch.slots.position[row]
            assert held[held >= 0].tolist() == layer.slots.position[0].flatten().tolist()
        start += fresh


@pytest.mark.parametrize("policy", SCORED, ids=repr)
def test_within_the_budget_nothing_is_lost(policy: Policy) -> None:
    """As many tokens as the budget: outputs are those of full attention."""
    text, layer = Text(7, 60), make_layer(type(policy)(variant="accum"), 60)
    outputs = [feed(layer, [(text, 0, 37)])]
    outputs += [feed(layer, [(text, i, i + 1)]) for i in range(37, 60)]
    whole = (text.queries[None], text.keys[None], text.values[None])
    full, _ = reference.attend(*whole, Ask(Step.plain(0, 60), 8**-0.5))
    torch.testing.assert_close(torch.cat(outputs, dim=2), full, atol=1e-5, rtol=1e-5)
    assert layer.slots.length == 60


def test_a_row_within_its_limit_is_not_touched_for_the_sake_of_another() -> None:
    """With slack, a row between target and limit keeps its tokens and its sample of none."""
    layer = make_layer(Buzz(preset="paper", **SIZES), 20, slack=4)
    long, short = Text(8, 40), Text(9, 40)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :2] = False
    feed(layer, [(long, 0, 20), (short, 0, 20)], real)
    feed(layer, [(long, 20, 21), (short, 20, 21)])
    assert layer.slots.counters["sample"].tolist() == [[5, 5], [0, 0]]
    assert layer.slots.count.tolist() == [[13, 13], [19, 19]]


@pytest.mark.parametrize("method", [Buzz, BuzzLog])
def test_room_is_made_in_the_layer_too(method: type[Buzz | BuzzLog]) -> None:
    """More than the budget can be asked for: sinks and window are left, and the turn goes on."""
    layer, text = make_layer(method(**SIZES), 20), Text(10, 90)
    feed(layer, [(text, 0, 20)])
    layer.make_room(5)
    assert int(layer.slots.count.max()) <= 15
    layer.make_room(50)
    assert int(layer.slots.count.max()) <= layer.policy.sizing.least - 1
    for head in layer.slots.position[0].tolist():
        assert head[:2] == [0, 1]
        assert head[-6:] == [14, 15, 16, 17, 18, 19]
    feed(layer, [(text, 20, 65)])
    assert int(layer.slots.count.max()) <= 20
    feed(layer, [(text, 65, 66)])
    assert layer.slots.position[0, :, :2].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("method", [Buzz, BuzzLog])
@pytest.mark.parametrize(("budget", "sinks"), [(48, [0, 1, 2, 3]), (31, [0])])
def test_making_room_leaves_the_recipe_its_sinks(
    method: type[Buzz | BuzzLog], budget: int, sinks: list[int]
) -> None:
    """One sink below a budget of 32: the recipe's, not what is left of it for the moment."""
    layer, text = make_layer(method(), budget), Text(10, 160)
    feed(layer, [(text, 0, 100)])
    for turn in (budget - 24, 1000):
        layer.make_room(turn)
        for head in layer.slots.position[0].tolist():
            assert [p for p in head if p < 4][: len(sinks)] == sinks
    feed(layer, [(text, 100, 160)])
    for head in layer.slots.position[0].tolist():
        assert head[: len(sinks)] == sinks
        assert budget // 4 <= len(head) <= budget
