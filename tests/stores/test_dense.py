"""The dense store: adopted prompts, growth in place, compaction, and honest bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.stores import STORES
from kvhive.stores.dense import DenseStore


def fresh(tokens: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor]:
    """Keys of width 4 and values of width 6."""
    return torch.randn(batch, heads, tokens, 4), torch.randn(batch, heads, tokens, 6)


def filled(tokens: int, capacity: int) -> tuple[DenseStore, Tensor, Tensor]:
    """A store with so many tokens, and what they are."""
    store, (keys, values) = DenseStore(), fresh(tokens)
    store.append(keys, values, capacity)
    return store, keys, values


def test_it_begins_empty() -> None:
    store = STORES["dense"]().new()
    assert (store.length, store.capacity, store.nbytes) == (0, 0, 0)


def test_a_prompt_is_held_apart_from_the_tensors_it_came_in() -> None:
    """On CPU it lies in memory of its own, whatever becomes of the model's."""
    store, keys, values = filled(9, 9)
    written = keys.clone(), values.clone()
    keys.zero_()
    values.zero_()
    assert torch.equal(store.keys, written[0])
    assert torch.equal(store.values, written[1])
    assert (store.length, store.capacity) == (9, 9)


def test_a_slice_of_something_larger_is_copied() -> None:
    """Else a fused projection's whole output would be kept alive by its key part."""
    both = torch.randn(2, 3, 9, 8)
    store = DenseStore()
    store.append(both[..., :4], both[..., 4:], 9)
    assert torch.equal(store.keys, both[..., :4])
    assert store.nbytes == both.numel() * 4


@pytest.mark.parametrize("capacity", [9, 10, 14, 40])
def test_appending_keeps_what_was_there(capacity: int) -> None:
    store, keys, values = filled(9, capacity)
    for tokens in (1, 3, 1):
        new_keys, new_values = fresh(tokens)
        room = max(capacity, store.length + tokens)
        before = store.capacity
        store.append(new_keys, new_values, room)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        assert store.capacity == room >= before
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
    index = torch.tensor([[[0, 8], [3, 4], [-1, 7]], [[1, 2], [-1, -1], [5, 6]]])
    store.compact(index, 5)
    assert (store.length, store.capacity) == (2, 5)
    for row in range(2):
        for head in range(3):
            for place, source in enumerate(index[row, head].tolist()):
                if source >= 0:
                    assert torch.equal(store.keys[row, head, place], keys[row, head, source])
                    assert torch.equal(store.values[row, head, place], values[row, head, source])
    assert store.nbytes == 2 * 3 * 5 * (4 + 6) * 4


def test_compaction_frees_the_prompt() -> None:
    store, keys, _ = filled(90, 90)
    before = store.nbytes
    store.compact(torch.arange(10).expand(2, 3, 10), 12)
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


def test_spare_room_can_be_read() -> None:
    store, keys, values = filled(9, 20)
    wide_keys, wide_values = store.read(16)
    assert wide_keys.shape[2] == wide_values.shape[2] == 16
    assert torch.equal(wide_keys[:, :, :9], keys)
    assert torch.equal(wide_values[:, :, :9], values)
    assert bool(wide_keys.isfinite().all())


def test_rows_are_selected_and_repeated() -> None:
    store, keys, values = filled(4, 6)
    store.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(store.keys, keys[[1, 1, 0]])
    assert torch.equal(store.values, values[[1, 1, 0]])
    assert store.capacity == 6


def test_moving_between_devices_keeps_all() -> None:
    store, keys, _ = filled(4, 6)
    store.to("cpu")
    assert torch.equal(store.keys, keys)
    DenseStore().to("cpu")
