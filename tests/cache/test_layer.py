"""HiveLayer: the order of a step, capacity, recording, and what it refuses."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from kvhive.cache.handoff import HANDLE, layer_of
from kvhive.cache.speculation import crop
from kvhive.kernels import Ask, Needs, reference
from kvhive.kernels.chunked import CHUNK
from kvhive.step import Step
from tests.contract.recipes import with_budget
from tests.support import Feeder, Largest, make_layer


def tokens(count: int, heads: int = 2, width: int = 8, batch: int = 1) -> torch.Tensor:
    """Random keys, values or queries."""
    return torch.randn(batch, heads, count, width)


def test_update_hands_out_keys_that_know_their_layer() -> None:
    layer = make_layer("h2o@20")
    keys, values = tokens(9), tokens(9)
    read, stored = layer.update(keys, values)
    assert layer_of(read) is layer
    assert torch.equal(read, keys)
    assert torch.equal(stored, values)
    layer.attend(tokens(9, heads=4), 0.3)
    assert not hasattr(layer.store.keys, HANDLE), "a stored tensor with a handle is a cycle"


@pytest.mark.parametrize("recipe", ["full", "h2o@20", "streaming_llm@20"])
def test_a_step_is_computed_before_its_eviction(recipe: str) -> None:
    """The output over all tokens held and brought, as of the moment before anything goes."""
    layer = make_layer(recipe)
    for count in (50, 1, 12, 1):
        held_keys = layer.store.keys if layer.get_seq_length() else tokens(0)
        held_values = layer.store.values if layer.get_seq_length() else tokens(0)
        keys, values, query = tokens(count), tokens(count), tokens(count, heads=4)
        wide = torch.cat([held_keys, keys], 2), torch.cat([held_values, values], 2)
        ask = Ask(Step.plain(0, count), 0.3)
        expected, _ = reference.attend(query, *wide, ask)
        layer.update(keys, values)
        assert torch.allclose(layer.attend(query, 0.3), expected, atol=1e-5)


def test_scores_are_the_attention_received() -> None:
    layer = make_layer("h2o@64")
    total = torch.zeros(1, 2, 0)
    for count in (20, 1, 5, 1):
        keys, query = tokens(count), tokens(count, heads=4)
        layer.update(keys, keys)
        layer.attend(query, 0.3)
        ask = Ask(Step.plain(0, count), 0.3, Needs(columns="sum"))
        _, seen = reference.attend(query, layer.store.keys, layer.store.values, ask)
        assert seen.columns is not None
        total = torch.nn.functional.pad(total, (0, count)) + seen.columns
        assert torch.allclose(layer.slots["score"], total, atol=1e-4)


@pytest.mark.parametrize("recipe", ["full", "window@30", "h2o(slack=0)@30"])
def test_decoding_copies_rarely(recipe: str) -> None:
    """Storage has headroom, so that most steps write in place; never more of it than is wanted."""
    feeder = Feeder(recipe)
    feeder.step(20)
    layer, addresses, longest = feeder.layer, [], 0
    for _ in range(200):
        feeder.step(1)
        addresses.append(layer.store.keys.data_ptr())
        assert layer.store.room - layer.store.length <= max(16, layer.store.length // 4)
        longest = max(longest, layer.store.room)
    moves = sum(a != b for a, b in pairwise(addresses))
    if recipe == "full":
        assert moves <= 8  # 16 slots at first, then by a quarter
    else:
        assert longest <= 31


def test_slack_spreads_the_copying() -> None:
    held = {}
    for slack in (0, 9):
        feeder = Feeder(f"window(slack={slack})@30")
        feeder.step(30)
        held[slack] = []
        for _ in range(40):
            feeder.step(1)
            held[slack].append(int(feeder.layer.slots.count.max()))
    assert set(held[0]) == {30}
    assert held[9] == [*range(21, 31)] * 4


def test_slack_spares_what_is_always_kept() -> None:
    """A share may turn out smaller than the slack; sinks, and one more token, stay even then."""
    feeder = Feeder("streaming_llm(sink=6, slack=500)@0.4")
    feeder.step(100)
    assert feeder.layer.slots.length == 65
    feeder.step(1)
    assert feeder.layer.slots.position[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 100]


def test_a_prompt_alone_uses_no_slack() -> None:
    feeder = Feeder("window(slack=9)@30")
    feeder.step(100)
    assert feeder.layer.slots.count.tolist() == [[30, 30]]


def test_a_share_follows_prompts_and_stays_while_decoding() -> None:
    feeder = Feeder("window(slack=0)@0.5")
    feeder.step(200)
    assert feeder.layer.slots.length == 100
    for _ in range(60):
        feeder.step(1)
    assert feeder.layer.slots.length == 100
    feeder.step(140)
    assert feeder.layer.slots.length == 200


def test_a_stream_of_single_tokens_is_shared_as_it_grows() -> None:
    feeder = Feeder("window(slack=0)@0.5")
    for _ in range(300):
        feeder.step(1)
    assert feeder.layer.slots.length == 150


def test_each_padded_row_has_its_own_share() -> None:
    feeder = Feeder("window(slack=0)@0.5", tapes=(0, 1, 2))
    feeder.step([400, 200, 90])
    assert feeder.layer.slots.count[:, 0].tolist() == [200, 100, 65]
    assert feeder.layer.progress.row_seen(3).tolist() == [400, 200, 90]


def test_a_copy_is_independent() -> None:
    feeder = Feeder("h2o@20")
    feeder.step(50)
    layer = feeder.layer
    twin = copy.deepcopy(layer)
    assert twin.store.keys.data_ptr() != layer.store.keys.data_ptr()
    before = layer.slots.position
    twin.update(tokens(9), tokens(9))
    twin.attend(tokens(9, heads=4), 0.3)
    assert torch.equal(layer.slots.position, before)
    assert layer.get_seq_length() == 50


@pytest.mark.parametrize(
    ("wrong", "shape"), [("batch", (2, 2, 1, 8)), ("heads", (1, 3, 1, 8)), ("width", (1, 2, 1, 9))]
)
def test_other_shapes_are_refused(wrong: str, shape: tuple[int, ...]) -> None:
    feeder = Feeder("h2o@20")
    feeder.step(5)
    with pytest.raises(ValueError, match=r"\(batch, KV heads, key width\) = .*make a new one"):
        feeder.layer.update(torch.randn(shape), torch.randn(shape))
    feeder.layer.reset()
    feeder.layer.update(torch.randn(shape), torch.randn(shape))
    assert feeder.layer.get_seq_length() == 1


def test_tokens_that_were_never_attended_are_found_out() -> None:
    feeder = Feeder("h2o@20")
    feeder.step(5)
    feeder.layer.update(tokens(1), tokens(1))
    with pytest.raises(ValueError, match="did not read the last tokens"):
        feeder.layer.update(tokens(1), tokens(1))


def test_what_transformers_asks() -> None:
    layer = make_layer("h2o@20")
    assert layer.get_seq_length() == 0
    assert layer.get_max_length() == -1
    assert layer.get_mask_sizes(3) == (3, 0)
    assert not layer.is_sliding
    assert not layer.is_compileable
    crop([layer], 0)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    layer.make_room(3)
    assert layer.nbytes == 0


@pytest.mark.parametrize("move", ["offload", "prefetch"])
def test_offloading_is_refused_by_name(move: str) -> None:
    feeder = Feeder("h2o@20")
    feeder.step(50)
    with pytest.raises(ValueError, match=r"a HiveCache cannot be offloaded.*a smaller budget"):
        getattr(feeder.layer, move)()
    feeder.step(1)
    feeder.check()


def test_gradients_are_not_kept() -> None:
    """A loop without `no_grad` must not chain every step to the one before."""
    layer = make_layer("h2o@64")
    for count in (30, 1, 1):
        keys = tokens(count).requires_grad_()
        layer.update(keys, keys)
        layer.attend(tokens(count, heads=4), 0.3)
    assert not layer.store.keys.requires_grad
    assert not layer.slots["score"].requires_grad
    copy.deepcopy(layer)


def test_one_spelled_out_life() -> None:
    """StreamingLLM with one sink and a budget of 4, by hand."""
    feeder = Feeder("streaming_llm(sink=1, slack=0)@4")
    expected = {6: [0, 3, 4, 5], 7: [0, 4, 5, 6], 9: [0, 6, 7, 8]}
    for count in (6, 1, 2):
        feeder.step(count)
        assert feeder.layer.slots.position[0, 1].tolist() == expected[feeder.seen[0]]
    feeder.check()


@pytest.mark.parametrize("recipe", ["full", "streaming_llm@300", "h2o@300", "l2norm@300"])
@pytest.mark.parametrize("drafts", [False, True], ids=["chunks", "drafts"])
def test_several_tokens_at_once_find_room(recipe: str, drafts: bool) -> None:
    """Neither chunks nor rounds of drafts copy the cache to new memory each time."""
    feeder = Feeder(recipe)
    if drafts:
        feeder.layer.activate_past_recording()
    feeder.step(300)
    if drafts:
        feeder.take_back(0)
    addresses = []
    for _ in range(30):
        feeder.step(6)
        if drafts:
            feeder.take_back(2)
        addresses.append(feeder.layer.store.keys.data_ptr())
    moves = sum(a != b for a, b in pairwise(addresses))
    assert moves <= (6 if recipe == "full" else 1)


@pytest.mark.parametrize("policy", [p for p in with_budget(100) if "percentile" not in p])
def test_no_prompt_leaves_rows_of_all_queries_lying_side_by_side(policy: str) -> None:
    """Hundreds of voting queries are read a block at a time, and reduced."""
    feeder = Feeder(policy)
    with Largest() as watch:
        feeder.step(1000)
    assert watch.nbytes <= feeder.heads * CHUNK * 1024 * 4
