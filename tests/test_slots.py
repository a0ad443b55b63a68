"""Slots: positions, validity and columns that grow, shrink and move together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.memory import take, widen
from kvhive.plan import Plan
from kvhive.slots import EMPTY, Column, Slots
from kvhive.step import Step

CPU = torch.device("cpu")


def make(batch: int = 2, heads: int = 3) -> Slots:
    """Slots with a float column, a wide byte column and a counter."""
    columns = {"score": Column(), "bits": Column(torch.uint8, (2,))}
    return Slots(batch, heads, columns, {"count": torch.int32}, CPU)


def rows_of(position: torch.Tensor) -> Step:
    """A step whose rows differ; position: int64 `[b, fresh]`, -1 for padding."""
    real = position >= 0
    last = int(position.max())
    return Step("prefill", position.shape[1], position, last, real.sum(1), real)


def named(plan: Plan) -> torch.Tensor:
    """int64 `[b, K, longest]`: the slots that a plan keeps, -1 where an entry means nothing."""
    return plan.index if plan.empty is None else plan.index.masked_fill(plan.empty, EMPTY)


def test_they_begin_empty() -> None:
    slots = make()
    assert (slots.batch, slots.heads, slots.length, slots.room) == (2, 3, 0, 0)
    assert slots.position.shape == (2, 3, 0)
    assert slots.counters["count"].tolist() == [[0, 0, 0]] * 2
    assert not slots.holes


def test_append_counts_positions_and_clears_columns() -> None:
    slots = make()
    slots.append(Step.plain(0, 4), 10)
    assert slots.position[1, 2].tolist() == [0, 1, 2, 3]
    slots["score"].fill_(7)
    slots.truncate(2)
    slots.append(Step.plain(2, 3), 10)
    assert slots.position[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert slots["score"][0, 0].tolist() == [7, 7, 0, 0, 0]
    assert (slots.length, slots.room) == (5, 10)


def test_padding_is_empty() -> None:
    slots = make()
    slots.append(rows_of(torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])), 4)
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
    slots, seen, alike = make(2, 1), 0, True
    for step in steps:
        if step == "ask":
            assert torch.equal(slots.count, slots.valid.sum(-1))
            assert bool((slots.tally >= slots.count).all())
        elif step == "all":
            position = (seen + torch.arange(2)).expand(2, 2)
            fresh = Step.plain(seen, 2) if alike else rows_of(position)
            slots.append(fresh, slots.length + 2)
            seen += 2
        elif step == "some":
            real = torch.rand(2, 3, generator=source) < 0.5
            position = (seen + torch.arange(3)).expand(2, 3).masked_fill(~real, -1)
            slots.append(rows_of(position), slots.length + 3)
            seen, alike = seen + 3, False
        elif step == "evict":
            keep = torch.rand(slots.valid.shape, generator=source) < 0.7
            plan = Plan.keeping(keep & slots.valid)
            slots.compact(plan, plan.longest)
        elif step == "take back":
            seen -= 1 if slots.length and alike else 0
            slots.truncate(max(0, slots.length - 1))
        else:
            slots.select_rows(torch.tensor([1, 1]))
    assert torch.equal(slots.count, slots.valid.sum(-1))
    assert torch.equal(slots.tally, slots.count)


def test_rank_skips_gaps_between_turns() -> None:
    slots = make(1, 1)
    slots.append(rows_of(torch.tensor([[0, 1, -1, -1, 2]])), 5)
    assert slots.rank[0, 0][slots.valid[0, 0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("first", [0, 32_700, 32_767, 32_768, 100_000])
def test_positions_grow_from_two_bytes_to_four(first: int) -> None:
    slots = make(1, 1)
    slots.append(Step.plain(first, 60), 60)
    assert slots.position[0, 0].tolist() == list(range(first, first + 60))
    wide = first + 59 > 32_767
    assert slots._position.element_size() == (4 if wide else 2)
    slots.append(rows_of(torch.tensor([[first + 60]])), 61)
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
def test_a_plan_lists_what_is_kept(keep: torch.Tensor) -> None:
    plan = Plan.keeping(keep)
    index, counts = named(plan), keep.sum(-1)
    assert plan.longest == index.shape[-1] == int(counts.max())
    assert plan.holes == (int(counts.min()) < plan.longest)
    assert torch.equal(plan.count, counts)
    assert torch.equal(plan.tally, counts)
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
    slots.append(Step.plain(0, n), n)
    mark = torch.arange(batch * heads * n).view(batch, heads, n)
    slots["score"].copy_(mark)
    slots["bits"].copy_(torch.stack([mark % 251, mark % 13], -1))
    plan = Plan.keeping(keep)
    index = named(plan)
    slots.compact(plan, plan.longest + spare)
    assert slots.room == slots.length + spare
    valid = slots.valid
    assert torch.equal(valid, index >= 0)
    assert torch.equal(slots.position[valid].long(), index[valid])
    expected = mark.gather(-1, index.clamp_min(0))
    assert torch.equal(slots["score"][valid].long(), expected[valid])
    assert torch.equal(slots["bits"][valid].long()[:, 0], expected[valid] % 251)
    assert torch.equal(slots["bits"][valid].long()[:, 1], expected[valid] % 13)


def test_rows_are_selected_with_all_they_have() -> None:
    slots = make()
    slots.append(rows_of(torch.tensor([[-1, 0], [0, 1]])), 3)
    slots["score"].copy_(torch.arange(12.0).view(2, 3, 2))
    slots.counters["count"].copy_(torch.tensor([[1] * 3, [2] * 3]))
    slots.select_rows(torch.tensor([1, 1, 0]))
    assert slots.batch == 3
    assert slots.position[:, 0].tolist() == [[0, 1], [0, 1], [-1, 0]]
    assert slots["score"][:, 0].tolist() == [[6, 7], [6, 7], [0, 1]]
    assert slots.counters["count"][:, 0].tolist() == [2, 2, 1]


def test_bytes_are_those_of_every_tensor() -> None:
    """8 bytes a head for the count that the CPU keeps; positions once somebody asked for them."""
    slots = make()
    slots.append(Step.plain(0, 4), 10)
    assert slots.nbytes == 2 * 3 * (10 * (4 + 2) + 4 + 8)
    _ = slots.position
    assert slots.nbytes == 2 * 3 * (10 * (2 + 4 + 2) + 4 + 8)


def taken(tensor: torch.Tensor, index: torch.Tensor, room: int) -> torch.Tensor:
    """`take` of the slots at int64 `[b, K, k]`."""
    kept = index.shape[-1]
    plan = Plan(index > -1, index, index.sum(-1), index.sum(-1), kept)
    return take(tensor, plan.rows(tensor.shape[2]), kept, room)


def test_take_and_widen_copy_whole_slots() -> None:
    tensor = torch.arange(24.0).view(1, 2, 4, 3)
    index = torch.tensor([[[3, 0], [1, 1]]])
    assert torch.equal(taken(tensor, index, 2)[0, 0], tensor[0, 0, [3, 0]])
    room = taken(tensor, index, 5)
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
    assert torch.equal(taken(tensor, index, 2), expected)


@given(keep=keep_masks())
@settings(deadline=None)
def test_as_many_slots_as_before_are_written_in_place(keep: torch.Tensor) -> None:
    """No fresh memory, and the same result as with some."""
    index = Plan.keeping(keep).index
    n = keep.shape[-1]
    held = torch.arange(keep.numel() * 3).view(*keep.shape, 3)
    elsewhere = taken(held, index, n + 1)
    where = held.data_ptr()
    here = taken(held, index, n)
    assert here.data_ptr() == where
    assert torch.equal(here, elsewhere[:, :, :n])
