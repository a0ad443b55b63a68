"""Cells and their winners, against definitions in plain Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.policies._parts.cells import (
    ceil_div,
    close_cells,
    event,
    fold_generations,
    merge_oldest,
    ranks,
    thin,
    tokens_seen,
    winners,
)
from kvhive.policies._parts.regions import Regions
from kvhive.slots import Slots
from tests.policies.rig import rows_of, small_numbers

SEEDS = st.integers(0, 10**6)


def masks(seed: int, heads: int, n: int, share: float) -> Tensor:
    """bool `[1, heads, n]`, true with the given probability."""
    return torch.rand(1, heads, n, generator=torch.Generator().manual_seed(seed)) < share


def chosen(mask: Tensor) -> list[int]:
    """Where a one-head mask is true."""
    places: list[int] = mask[0, 0].nonzero().flatten().tolist()
    return places


def one_head(number: int) -> Tensor:
    """int64 `[1, 1]`."""
    return torch.tensor([[number]])


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 20), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_every_cell_keeps_its_best_member(seed: int, n: int, share: float) -> None:
    """Ties go to the oldest; without scores the oldest wins; cells without members keep nothing."""
    cell = torch.randint(0, n, (1, 2, n), generator=torch.Generator().manual_seed(seed))
    member, score = masks(seed, 2, n, share), small_numbers(seed, 1, 2, n)
    for judge in (score, None):
        kept = winners(cell, member, judge)
        for head in range(2):
            expected = set()
            for c in range(n):
                inside = [j for j in range(n) if member[0, head, j] and cell[0, head, j] == c]
                values = {j: 0.0 if judge is None else float(judge[0, head, j]) for j in inside}
                if inside:
                    expected.add(max(inside, key=lambda j: (values[j], -j)))
            assert set(kept[0, head].nonzero().flatten().tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sink=st.integers(0, 3),
    sample=st.integers(0, 6),
    fresh=st.integers(1, 11),
    window=st.integers(1, 4),
    beyond=st.integers(0, 3),
    stride=st.integers(1, 6),
)
def test_an_event_thins_the_old_and_samples_the_fresh(
    seed: int, sink: int, sample: int, fresh: int, window: int, beyond: int, stride: int
) -> None:
    """On the first `length` tokens alive; empty slots before them, tokens behind: no matter."""
    length, empty = sink + sample + fresh + window, 2
    n = empty + length + beyond
    alive, score = torch.arange(n)[None, None] >= empty, small_numbers(seed, 1, 1, n)
    old_stride = (stride + 1) // 2
    regions = Regions(one_head(sink), one_head(sample + fresh), one_head(window))
    stay, size = event(
        alive, one_head(sample), one_head(length), score, regions, one_head(stride), old_stride
    )
    tokens, values = list(range(empty, n)), score[0, 0].tolist()
    old = tokens[sink : sink + sample][::old_stride]
    new = tokens[sink + sample : length - window]
    blocks = [new[i : i + stride] for i in range(0, fresh, stride)]
    picks = [max(block, key=lambda j: (values[j], -j)) for block in blocks]
    assert chosen(stay) == tokens[:sink] + old + picks + tokens[length - window :]
    assert int(size) == len(old) + len(picks)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, sink=st.integers(0, 3), sample=st.integers(0, 9), old_stride=st.integers(1, 4))
def test_thinning_goes_by_place(seed: int, sink: int, sample: int, old_stride: int) -> None:
    """Every so-manieth entry of the sample stays, its first always."""
    alive = masks(seed, 1, 20, 0.8)
    alive[..., -12:] = True
    stay, size = thin(alive, one_head(sample), one_head(sink), old_stride)
    tokens = chosen(alive)
    old = tokens[sink : sink + sample][::old_stride]
    assert chosen(stay) == tokens[:sink] + old + tokens[sink + sample :]
    assert int(size) == len(old)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sink=st.integers(0, 2),
    sample=st.integers(0, 4),
    fresh=st.integers(0, 12),
    stride=st.integers(1, 5),
)
def test_only_whole_blocks_become_cells(
    seed: int, sink: int, sample: int, fresh: int, stride: int
) -> None:
    """What is left over stays fresh; levels of all others are untouched."""
    window, n = 3, sink + sample + fresh + 3
    level = torch.zeros(1, 1, n, dtype=torch.int64)
    level[..., sink : sink + sample] = 2
    score, alive = small_numbers(seed, 1, 1, n), torch.ones(1, 1, n, dtype=torch.bool)
    regions = Regions(one_head(sink), one_head(sample + fresh), one_head(window))
    stay, level_after, loose = close_cells(alive, level, one_head(sample), score, regions, stride)
    start, values = sink + sample, score[0, 0].tolist()
    blocks = [range(start + i, start + i + stride) for i in range(0, fresh - stride + 1, stride)]
    picks = [max(block, key=lambda j: (values[j], -j)) for block in blocks]
    assert int(loose) == fresh % stride
    left_over = list(range(start + fresh - fresh % stride, n))
    assert chosen(stay) == list(range(start)) + picks + left_over
    assert [j for j in chosen(stay) if level_after[0, 0, j] == 1] == picks
    assert all(level_after[0, 0, j] == level[0, 0, j] for j in chosen(stay) if j not in picks)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS, counts=st.lists(st.integers(0, 7), min_size=1, max_size=4), cells=st.integers(1, 4)
)
def test_folding_merges_the_oldest_pairs(seed: int, counts: list[int], cells: int) -> None:
    """Pair by pair, from the youngest generation up, until none holds too many cells."""
    ages = [g for g in range(len(counts), 0, -1) for _ in range(counts[g - 1])]
    n = len(ages) + 2
    level = torch.tensor([[[0, *ages, 0]]])
    score, alive = small_numbers(seed, 1, 1, n), torch.ones(1, 1, n, dtype=torch.bool)
    stay, level_after = fold_generations(alive, level, score, one_head(cells))
    held, values = [(g, j + 1) for j, g in enumerate(ages)], score[0, 0].tolist()
    generation = 1
    while any(g >= generation for g, _ in held):
        while sum(g == generation for g, _ in held) > cells:
            place = next(i for i, (g, _) in enumerate(held) if g == generation and merges(held, i))
            pair = [j for _, j in held[place : place + 2]]
            best = max(pair, key=lambda j: (values[j], -j))
            held[place : place + 2] = [(generation + 1, best)]
        generation += 1
    assert chosen(stay) == [0, *[j for _, j in held], n - 1]
    assert [int(level_after[0, 0, j]) for _, j in held] == [g for g, _ in held]
    assert all(sum(g == top for g, _ in held) <= cells for top in range(1, generation))


def merges(held: list[tuple[int, int]], place: int) -> bool:
    """Whether the cell at `place` has a neighbour of its own generation behind it."""
    return place + 1 < len(held) and held[place + 1][0] == held[place][0]


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, cells=st.integers(0, 8), most=st.integers(1, 9))
def test_the_oldest_cells_merge_into_one(seed: int, cells: int, most: int) -> None:
    """Only as many as are too many; tokens that are not history stay."""
    level = torch.tensor([[[0, *range(cells, 0, -1), 0, 0]]])
    score = small_numbers(seed, 1, 1, cells + 3)
    alive = torch.ones_like(level, dtype=torch.bool)
    stay, level_after = merge_oldest(alive, level, score, one_head(most))
    history, values = list(range(1, cells + 1)), score[0, 0].tolist()
    excess = max(cells - most, 0)
    if excess:
        merged = max(history[: excess + 1], key=lambda j: (values[j], -j))
        history = [merged, *history[excess + 1 :]]
    assert chosen(stay) == [0, *history, cells + 1, cells + 2]
    ages = level_after[0, 0, torch.tensor(history, dtype=torch.int64)].tolist()
    assert ages == [cells, *range(len(history) - 1, 0, -1)][: len(history)]


def test_ranks_count_the_living() -> None:
    """Places among the slots alive."""
    alive = torch.tensor([[[False, True, False, True, True]]])
    assert ranks(alive)[alive].tolist() == [0, 1, 2]


def test_division_rounds_up() -> None:
    """By an int and by a tensor."""
    assert ceil_div(torch.tensor([0, 1, 5, 6]), 5).tolist() == [0, 1, 1, 2]
    assert ceil_div(torch.tensor([7, 8]), torch.tensor([2, 4])).tolist() == [4, 2]


def test_tokens_seen_ignores_padding_behind() -> None:
    """The newest token counts, even when the newest slot is empty."""
    slots = Slots(2, 1, {}, {}, torch.device("cpu"))
    slots.append(rows_of(torch.tensor([[-1, 0, 1, 2], [0, 1, -1, -1]])), 4)
    assert tokens_seen(slots).tolist() == [[3], [2]]
