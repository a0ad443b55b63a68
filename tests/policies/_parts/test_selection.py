"""Ways to choose slots, against definitions in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.plan import Plan
from kvhive.policies._parts.selection import keep_top, layer_mean, lengths, recent, sinks
from kvhive.slots import Slots
from kvhive.step import Step

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def slots_with(counts: list[int]) -> Slots:
    """One row, a head for every count: right-aligned, at least the first two slots empty, as they
    are once a row that holds more has left the batch.
    """
    slots = Slots(2, len(counts), {}, {}, torch.device("cpu"))
    length = max(counts) + 2
    slots.append(Step.plain(0, length), length)
    number = torch.arange(length)
    keep = torch.stack([number >= length - count for count in counts])
    slots.compact(Plan.keeping(torch.stack([keep, torch.ones_like(keep)])), length)
    slots.select_rows(torch.tensor([0]))
    assert slots.length == length
    return slots


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, size=st.integers(-3, 12))
def test_sinks_and_recent_are_ends_of_what_a_head_holds(counts: list[int], size: int) -> None:
    """Empty slots count neither as first nor as last; a size of zero or less chooses nothing."""
    slots = slots_with(counts)
    for head, count in enumerate(counts):
        held = [p for p in slots.position[0, head].tolist() if p >= 0]
        assert len(held) == count
        chosen = slots.position[0, head][sinks(slots, size)[0, head]].tolist()
        assert chosen == held[: max(size, 0)]
        chosen = slots.position[0, head][recent(slots, size)[0, head]].tolist()
        assert chosen == held[max(count - max(size, 0), 0) :]


def test_recent_takes_a_size_for_every_head() -> None:
    """Sizes as a tensor `[b, K]`."""
    slots = slots_with([5, 3, 0])
    chosen = recent(slots, torch.tensor([[2, 9, 1]]))
    assert chosen.sum(-1).tolist() == [[2, 3, 0]]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 12),
    newer_first=st.booleans(),
    numbers=st.lists(st.integers(-1, 14), min_size=3, max_size=3),
)
def test_keep_top_matches_a_sort(seed: int, n: int, newer_first: bool, numbers: list[int]) -> None:
    """Few values, so many ties: they go to the older token, or to the newer one if asked."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (1, 3, n), generator=generator).float()
    candidates = torch.rand(1, 3, n, generator=generator) < 0.7
    kept = keep_top(score, candidates, torch.tensor([numbers]), newer_first)
    for head, number in enumerate(numbers):
        values, may = score[0, head].tolist(), candidates[0, head].tolist()
        order = sorted(
            (j for j in range(n) if may[j]), key=lambda j: (-values[j], -j if newer_first else j)
        )
        expected = sorted(order[: max(number, 0)])
        assert kept[0, head].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keep_top_compares_in_float32(dtype: torch.dtype) -> None:
    """Low-precision scores are ranked by their values, ties included."""
    score = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]], dtype=dtype)
    kept = keep_top(score, torch.ones_like(score, dtype=torch.bool), torch.tensor([[2]]))
    assert kept.tolist() == [[[False, True, True, False]]]


def test_the_mean_goes_over_the_heads_that_hold_a_token() -> None:
    """Looked up by position where heads hold different tokens; empty slots are nobody's."""
    position = torch.tensor([[[-1, -1, 2, 9], [-1, 2, 4, 9], [0, 2, 4, 9]]], dtype=torch.int32)
    score = torch.tensor([[[9.0, 9.0, 1.0, 2.0], [9.0, 3.0, 8.0, 4.0], [7.0, 5.0, 2.0, 6.0]]])
    mean = layer_mean(score, position)[0]
    assert mean[0, 2:].tolist() == [3.0, 4.0]
    assert mean[1, 1:].tolist() == [3.0, 5.0, 4.0]
    assert mean[2].tolist() == [7.0, 3.0, 5.0, 4.0]
    same = position[:, 2:].expand(-1, 3, -1)
    assert torch.equal(layer_mean(score, same), score.mean(1, keepdim=True).expand(-1, 3, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_lengths_are_summed_in_float32_or_better(dtype: torch.dtype) -> None:
    """Of 1,024 ones the length is 32, which bfloat16 sums would miss."""
    vectors = torch.ones(1, 2, 3, 1024, dtype=dtype)
    assert torch.equal(lengths(vectors), torch.full((1, 2, 3), 32.0))
