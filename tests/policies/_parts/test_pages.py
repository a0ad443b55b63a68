"""Freeing pages against a slow oracle, with many ties and uneven heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.plan import Plan
from kvhive.policies._parts import pages
from kvhive.slots import Column, Slots
from kvhive.step import Step


def slow_free(
    score: list[dict[int, float]], evictable: list[set[int]], number: int, page: int
) -> tuple[list[set[int]], list[int]]:
    """What each head loses, and how many pages, for heads given as position -> score."""
    order, offers = [], []
    for head, held in enumerate(score):
        ranked = sorted(held.keys() & evictable[head], key=lambda p, h=held: (h[p], -p))
        order.append(ranked)
        last = (len(held) - 1) % page + 1
        for extra in range(len(held)):
            cost = extra * page + last
            if cost <= len(ranked):
                offers.append((held[ranked[cost - 1]], head, extra + 1, cost))
    chosen = sorted(offers)[:number]
    cost = [max((c for _, h, _, c in chosen if h == head), default=0) for head in range(len(score))]
    freed = [sum(h == head for _, h, _, _ in chosen) for head in range(len(score))]
    return [set(ranked[:gone]) for ranked, gone in zip(order, cost, strict=True)], freed


def random_heads(seed: int, rows: int, heads: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, positions right-aligned with empty slots in front, evictable."""
    source = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (rows, heads, n), generator=source).float()
    empty = torch.randint(0, n + 1, (rows, heads, 1), generator=source)
    slot = torch.arange(n)
    position = torch.where(slot >= empty, slot, -1)
    evictable = (position >= 0) & (position < n - 3)
    evictable &= torch.rand(rows, heads, n, generator=source) < 0.9
    return score, position, evictable


@pytest.mark.parametrize("page", [1, 2, 4, 16])
@pytest.mark.parametrize("seed", range(12))
def test_the_cheapest_pages_go(page: int, seed: int) -> None:
    rows, heads, n = 3, 5, 33
    score, position, evictable = random_heads(seed, rows, heads, n)
    held = position >= 0
    number = torch.tensor([0, 3, 200 // page])
    keep = pages.free(score, held, evictable, number, page)
    for row in range(rows):
        as_sets = [
            {p: float(score[row, head, p]) for p in position[row, head].tolist() if p >= 0}
            for head in range(heads)
        ]
        may_go = [set(evictable[row, head].nonzero().flatten().tolist()) for head in range(heads)]
        gone, freed = slow_free(as_sets, may_go, int(number[row]), page)
        for head in range(heads):
            expected = sorted(as_sets[head].keys() - gone[head])
            ours = keep[row, head].nonzero().flatten().tolist()
            assert ours == expected
            before, after = len(as_sets[head]), len(expected)
            assert -(-before // page) - -(-after // page) == freed[head]
            assert after == before or after % page == 0, "who gives up pages is left with full ones"
    assert torch.equal(keep[0], held[0])
    assert bool((keep | ~held | evictable).all()), "what is not evictable stays"


def test_no_page_kept_is_worth_less_than_one_given_up() -> None:
    """Page size 1: a page is a token."""
    score, position, evictable = random_heads(7, 1, 4, 50)
    held = position >= 0
    keep = pages.free(score, held, evictable, torch.tensor([40]), page=1)
    gone = held & ~keep
    assert int(gone.sum()) == 40
    assert score[gone].max() <= score[keep & evictable].min()


def test_layers_side_by_side_come_apart_again() -> None:
    """Layers that hold different numbers of slots, with the empty ones in front."""
    slots = []
    for layer, (heads, size) in enumerate([(2, 7), (2, 9), (1, 4)]):
        held = Slots(1, heads, {"score": Column()}, {}, torch.device("cpu"))
        held.append(Step.plain(0, 10), 10)
        held["score"].copy_(100.0 * layer + torch.arange(10.0))
        held.compact(Plan.keeping((torch.arange(10) < size).expand(1, heads, 10)), size)
        slots.append(held)
    position, score = pages.side_by_side(slots, "score")
    assert position.shape == score.shape == (1, 5, 9)
    assert position[0, :, 0].tolist() == [-1, -1, 0, 0, -1]
    assert score[0, 4].tolist() == [0, 0, 0, 0, 0, 200, 201, 202, 203]
    parts = pages.apart(position, slots)
    assert all(torch.equal(part, held.position) for part, held in zip(parts, slots, strict=True))
