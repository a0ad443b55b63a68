"""Slots: positions, validity and columns that grow, shrink and move together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.slots import Column, Slots, packed_index, take, widen

CPU = torch.device("cpu")


def make(batch: int = 2, heads: int = 3) -> Slots:
    """Slots with a float column, a wide byte column and a counter."""
    columns = {"score": Column(), "bits": Column(torch.uint8, (2,))}
    return Slots(batch, heads, columns, {"count": torch.int32}, CPU)


def test_they_begin_empty() -> None:
    slots = make()
    assert (slots.batch, slots.heads, slots.length, slots.capacity) == (2, 3, 0, 0)
    assert slots.position.shape == (2, 3, 0)
    assert slots.counters["count"].tolist() == [[0, 0, 0]] * 2
    assert not slots.holes


def test_append_counts_positions_and_clears_columns() -> None:
    slots = make()
    slots.append(0, 4, 10)
    assert slots.position[1, 2].tolist() == [0, 1, 2, 3]
    slots["score"].fill_(7)
    slots.truncate(2)
    slots.append(2, 3, 10)
    assert slots.position[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert slots["score"][0, 0].tolist() == [7, 7, 0, 0, 0]
    assert (slots.length, slots.capacity) == (5, 10)


def test_padding_is_empty() -> None:
    slots = make()
    slots.append(torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]]), 4, 4)
    assert slots.holes
    assert slots.count.tolist() == [[2] * 3, [4] * 3]
    assert slots.valid[0, 0].tolist() == [False, False, True, True]
    assert slots.rank[1, 0].tolist() == [0, 1, 2, 3]
    assert slots.rank[0, 1, 2:].tolist() == [0, 1]
    assert bool((slots.rank[0, :, :2] < 0).all())


@given(
    steps=st.lists(
        st.sampled_from(["ask", "all", "some", "evict", "take back", "rows"]), max_size=12
    ),
    seed=st.integers(0, 1_000),
)
@settings(deadline=None)
def test_tokens_are_counted_right_after_any_steps(steps: list[str], seed: int) -> None:
    """Without holes nothing is counted; whatever happens, the number is that of a count."""
    source = torch.Generator().manual_seed(seed)
    slots, seen = make(2, 1), 0
    for step in steps:
        if step == "ask":
            assert torch.equal(slots.count, slots.valid.sum(-1))
        elif step == "all":
            slots.append(seen, 2, slots.length + 2)
            seen += 2
        elif step == "some":
            real = torch.rand(2, 3, generator=source) < 0.5
            position = (seen + torch.arange(3)).expand(2, 3).masked_fill(~real, -1)
            slots.append(position, 3, slots.length + 3)
            seen += 3
        elif step == "evict":
            keep = torch.rand(slots.valid.shape, generator=source) < 0.7
            index, holes = packed_index(keep & slots.valid)
            slots.compact(index, index.shape[-1], holes)
        elif step == "take back":
            slots.truncate(max(0, slots.length - 1))
        else:
            slots.select_rows(torch.tensor([1, 1]))
    assert torch.equal(slots.count, slots.valid.sum(-1))


def test_rank_skips_gaps_between_turns() -> None:
    slots = make(1, 1)
    slots.append(torch.tensor([[0, 1, -1, -1, 2]]), 5, 5)
    assert slots.rank[0, 0][slots.valid[0, 0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("first", [0, 32_700, 32_767, 32_768, 100_000])
def test_positions_grow_from_two_bytes_to_four(first: int) -> None:
    slots = make(1, 1)
    slots.append(first, 60, 60)
    assert slots.position[0, 0].tolist() == list(range(first, first + 60))
    wide = first + 59 > 32_767
    assert slots._position.element_size() == (4 if wide else 2)
    slots.append(torch.tensor([[first + 60]]), 1, 61)
    assert int(slots.position[0, 0, -1]) == first + 60


@st.composite
def keep_masks(draw: st.DrawFn) -> torch.Tensor:
    """bool `[b, K, n]` with a given share of slots kept, and heads that differ."""
    shape = [draw(st.integers(1, size)) for size in (3, 3, 40)]
    source = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return torch.rand(shape, generator=source) < share


@given(keep=keep_masks())
@settings(deadline=None)
def test_packed_index_lists_what_is_kept(keep: torch.Tensor) -> None:
    index, holes = packed_index(keep)
    counts = keep.sum(-1)
    assert index.shape[-1] == int(counts.max())
    assert holes == (int(counts.min()) < index.shape[-1])
    for row in range(keep.shape[0]):
        for head in range(keep.shape[1]):
            expected = keep[row, head].nonzero().flatten().tolist()
            gaps = index.shape[-1] - len(expected)
            assert index[row, head].tolist() == [-1] * gaps + expected


@given(keep=keep_masks(), spare=st.integers(0, 5))
@settings(deadline=None)
def test_everything_moves_together(keep: torch.Tensor, spare: int) -> None:
    batch, heads, n = keep.shape
    slots = make(batch, heads)
    slots.append(0, n, n)
    mark = torch.arange(batch * heads * n).view(batch, heads, n)
    slots["score"].copy_(mark)
    slots["bits"].copy_(torch.stack([mark % 251, mark % 13], -1))
    index, holes = packed_index(keep)
    slots.compact(index, index.shape[-1] + spare, holes)
    assert slots.capacity == slots.length + spare
    valid = slots.valid
    assert torch.equal(valid, index >= 0)
    assert torch.equal(slots.position[valid].long(), index[valid])
    expected = mark.gather(-1, index.clamp_min(0))
    assert torch.equal(slots["score"][valid].long(), expected[valid])
    assert torch.equal(slots["bits"][valid].long()[:, 0], expected[valid] % 251)
    assert torch.equal(slots["bits"][valid].long()[:, 1], expected[valid] % 13)


def test_rows_are_selected_with_all_they_have() -> None:
    slots = make()
    slots.append(torch.tensor([[-1, 0], [0, 1]]), 2, 3)
    slots["score"].copy_(torch.arange(12.0).view(2, 3, 2))
    slots.counters["count"].copy_(torch.tensor([[1] * 3, [2] * 3]))
    slots.select_rows(torch.tensor([1, 1, 0]))
    assert slots.batch == 3
    assert slots.position[:, 0].tolist() == [[0, 1], [0, 1], [-1, 0]]
    assert slots["score"][:, 0].tolist() == [[6, 7], [6, 7], [0, 1]]
    assert slots.counters["count"][:, 0].tolist() == [2, 2, 1]


def test_bytes_are_those_of_every_tensor() -> None:
    slots = make()
    slots.append(0, 4, 10)
    assert slots.nbytes == 2 * 3 * (10 * (2 + 4 + 2) + 4)


def test_take_and_widen_copy_whole_slots() -> None:
    tensor = torch.arange(24.0).view(1, 2, 4, 3)
    index = torch.tensor([[[3, 0], [1, 1]]])
    assert torch.equal(take(tensor, index, 2)[0, 0], tensor[0, 0, [3, 0]])
    room = take(tensor, index, 5)
    assert room.shape == (1, 2, 5, 3)
    assert torch.equal(room[0, 1, :2], tensor[0, 1, [1, 1]])
    assert float(room[:, :, 2:].abs().max()) == 0
    wide = widen(tensor, 3, 6)
    assert torch.equal(wide[:, :, :3], tensor[:, :, :3])
    assert float(wide[:, :, 3:].abs().max()) == 0


def test_take_reads_tensors_of_any_layout() -> None:
    tensor = torch.arange(48.0).view(2, 4, 2, 3).transpose(1, 2)  # as projections write their keys
    index = torch.tensor([[[0, 2], [1, 3]], [[3, 3], [0, 1]]])
    expected = tensor.gather(2, index[..., None].expand(2, 2, 2, 3))
    assert torch.equal(take(tensor, index, 2), expected)


@given(keep=keep_masks())
@settings(deadline=None)
def test_as_many_slots_as_before_are_written_in_place(keep: torch.Tensor) -> None:
    """No fresh memory, and the same result as with some."""
    index = packed_index(keep)[0].clamp_min(0)
    n = keep.shape[-1]
    held = torch.arange(keep.numel() * 3).view(*keep.shape, 3)
    elsewhere = take(held, index, n + 1)
    where = held.data_ptr()
    here = take(held, index, n)
    assert here.data_ptr() == where
    assert torch.equal(here, elsewhere[:, :, :n])
