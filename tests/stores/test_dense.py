"""The dense store: adopted prompts, growth in place, compaction, and honest bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.kernels import Ask, Needs, reference
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores import STORES, LayerFacts
from kvhive.stores._ragged import RaggedStore
from kvhive.stores.dense import DenseStore


def fresh(tokens: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor]:
    """Keys of width 4 and values of width 6."""
    return torch.randn(batch, heads, tokens, 4), torch.randn(batch, heads, tokens, 6)


def filled(tokens: int, room: int) -> tuple[DenseStore, Tensor, Tensor]:
    """A store with so many tokens, and what they are."""
    store, (keys, values) = DenseStore(), fresh(tokens)
    store.append(keys, values, room)
    return store, keys, values


def keeping(kept: list[list[list[int]]], length: int) -> Plan:
    """The plan that keeps these slots, row by row and head by head, of `length`."""
    keep = torch.zeros(len(kept), len(kept[0]), length, dtype=torch.bool)
    for row, heads in enumerate(kept):
        for head, slots in enumerate(heads):
            keep[row, head, slots] = True
    return Plan.keeping(keep)


def test_it_begins_empty() -> None:
    store = STORES["dense"]().new(LayerFacts(), [])
    assert (store.length, store.room, store.nbytes) == (0, 0, 0)


def test_a_prompt_is_held_apart_from_the_tensors_it_came_in() -> None:
    """On CPU it lies in memory of its own, whatever becomes of the model's."""
    store, keys, values = filled(9, 9)
    written = keys.clone(), values.clone()
    keys.zero_()
    values.zero_()
    assert torch.equal(store.keys, written[0])
    assert torch.equal(store.values, written[1])
    assert (store.length, store.room) == (9, 9)


def test_a_slice_of_something_larger_is_copied() -> None:
    """Else a fused projection's whole output would be kept alive by its key part."""
    both = torch.randn(2, 3, 9, 8)
    store = DenseStore()
    store.append(both[..., :4], both[..., 4:], 9)
    assert torch.equal(store.keys, both[..., :4])
    assert store.nbytes == both.numel() * 4


@pytest.mark.parametrize("room", [9, 10, 14, 40])
def test_appending_keeps_what_was_there(room: int) -> None:
    store, keys, values = filled(9, room)
    for tokens in (1, 3, 1):
        new_keys, new_values = fresh(tokens)
        wanted = max(room, store.length + tokens)
        before = store.room
        store.append(new_keys, new_values, wanted)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        assert store.room == wanted >= before
        assert torch.equal(store.keys, keys)
        assert torch.equal(store.values, values)


def test_decoding_writes_in_place() -> None:
    store, _, _ = filled(9, 20)
    address = store.keys.data_ptr()
    for _ in range(11):
        store.append(*fresh(1), 20)
    assert store.keys.data_ptr() == address
    assert store.length == 20


def test_compaction_keeps_slots_head_by_head() -> None:
    store, keys, values = filled(9, 9)
    kept = [[[0, 8], [3, 4], [7, 8]], [[1, 2], [0, 6], [5, 6]]]
    store.compact(keeping(kept, 9), 5)
    assert (store.length, store.room) == (2, 5)
    for row in range(2):
        for head in range(3):
            for place, source in enumerate(reversed(kept[row][head]), 1):
                assert torch.equal(store.keys[row, head, -place], keys[row, head, source])
                assert torch.equal(store.values[row, head, -place], values[row, head, source])
    assert store.nbytes == 2 * 3 * 5 * (4 + 6) * 4


def test_heads_that_differ_are_held_ragged() -> None:
    store, keys, values = filled(9, 9)
    kept = [[[0, 8], [3, 4], [7]], [[1, 2], [], [5, 6]]]
    ragged = store.compact(keeping(kept, 9), 5)
    assert isinstance(ragged, RaggedStore)
    assert (ragged.length, ragged.room) == (2, 5)
    for row in range(2):
        for head in range(3):
            for place, source in enumerate(reversed(kept[row][head]), 1):
                assert torch.equal(ragged.view()[0][row, head, -place], keys[row, head, source])
                assert torch.equal(ragged.view()[1][row, head, -place], values[row, head, source])


def test_compaction_frees_the_prompt() -> None:
    store, keys, _ = filled(90, 90)
    before = store.nbytes
    store.compact(keeping([[[*range(10)]] * 3] * 2, 90), 12)
    assert store.nbytes == before * 12 // 90
    assert store.keys.data_ptr() != keys.data_ptr()


def test_the_newest_can_be_forgotten() -> None:
    store, keys, values = filled(9, 12)
    store.truncate(6)
    assert torch.equal(store.keys, keys[:, :, :6])
    new_keys, new_values = fresh(1)
    store.append(new_keys, new_values, 12)
    assert torch.equal(store.values, torch.cat([values[:, :, :6], new_values], 2))


def test_everything_can_be_forgotten() -> None:
    store, _, _ = filled(9, 9)
    store.truncate(0)
    keys, values = fresh(3)
    store.append(keys, values, 3)
    assert torch.equal(store.keys, keys)
    assert torch.equal(store.values, values)


def test_keys_can_be_taken_out_and_put_back() -> None:
    store, keys, values = filled(9, 20)
    marked = torch.rand(2, 3, 9) < 0.4
    taken = store.take_keys(marked)
    assert torch.equal(taken, keys[marked])
    store.put_keys(marked, 2 * taken)
    assert torch.equal(store.keys, torch.where(marked[..., None], 2 * keys, keys))
    assert torch.equal(store.view()[1], values)


@pytest.mark.parametrize("fresh_tokens", [1, 4])
def test_it_attends_and_reports_what_the_reference_does(fresh_tokens: int) -> None:
    store, keys, values = filled(9, 20)
    query = torch.randn(2, 6, fresh_tokens, 4)
    ask = Ask(Step.plain(9 - fresh_tokens, fresh_tokens), 0.5, Needs(columns="sum"))
    expected, told = reference.attend(query, keys, values, ask)
    out, seen = store.attend(query, ask)
    assert torch.allclose(out, expected, atol=1e-5)
    assert told.columns is not None
    for report in (seen, store.report(query, ask)):
        assert report.columns is not None
        assert torch.allclose(report.columns, told.columns, atol=1e-5)


def test_rows_are_selected_and_repeated() -> None:
    store, keys, values = filled(4, 6)
    store.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(store.keys, keys[[1, 1, 0]])
    assert torch.equal(store.values, values[[1, 1, 0]])
    assert store.room == 6
