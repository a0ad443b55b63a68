"""The ring of votes against a dictionary."""

from __future__ import annotations

import pytest
import torch

from kvhive.policies._parts import votes
from kvhive.slots import Slots

CPU = torch.device("cpu")


def random_bits(source: torch.Generator, *shape: int) -> torch.Tensor:
    """bool, half of them true."""
    return torch.rand(shape, generator=source) < 0.5


@pytest.mark.parametrize("history", [1, 3, 8, 13, 16, 21])
@pytest.mark.parametrize("seed", range(3))
def test_the_ring_remembers_the_last_queries(history: int, seed: int) -> None:
    """Steps of any length, rows of which some are padded, counted over any number of queries."""
    source = torch.Generator().manual_seed(seed)
    batch, heads, slots = 3, 2, 5
    ring = torch.zeros(batch, heads, slots, votes.ring_bytes(history), dtype=torch.uint8)
    seen = torch.zeros(batch, dtype=torch.int64)
    remembered: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    for _ in range(12):
        rows = int(torch.randint(1, history + 1, (1,), generator=source))
        real = random_bits(source, batch, rows).sort(1).values  # padding on the left
        position = (seen[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        seen = seen + real.sum(1)
        vote = random_bits(source, batch, heads, rows, slots)
        votes.record(ring, vote, position, history)
        for row in range(batch):
            new = [vote[row, :, i] for i in range(rows) if bool(real[row, i])]
            remembered[row] = (remembered[row] + new)[-history:]
        for number in {1, (history + 1) // 2, history}:
            newest = (seen - 1)[:, None].expand(-1, heads)
            counted = votes.count(ring, newest, torch.full((batch, heads), number), history)
            for row in range(batch):
                last = remembered[row][-number:] if int(seen[row]) else []
                expected = sum((v.long() for v in last), torch.zeros(heads, slots).long())
                assert torch.equal(counted[row], expected)


@pytest.mark.parametrize("history", [1, 8, 13])
def test_a_query_of_all_rows_at_once_writes_what_it_writes_row_by_row(history: int) -> None:
    """A position that all rows share may be given as one number."""
    source = torch.Generator().manual_seed(history)
    apart = torch.zeros(3, 2, 5, votes.ring_bytes(history), dtype=torch.uint8)
    together = apart.clone()
    for position in range(30):
        vote = random_bits(source, 3, 2, 1, 5)
        votes.record(apart, vote, torch.full((3, 1), position), history)
        votes.record(together, vote, position, history)
        assert torch.equal(apart, together)


def test_voters_are_told_by_one_number_where_all_rows_agree() -> None:
    """The last query's position; row by row once padding has been seen."""
    slots = Slots(2, 1, {}, {}, CPU)
    slots.append(0, 4, 8)
    assert votes.voters(slots, 1) == 3
    several = votes.voters(slots, 2)
    assert isinstance(several, torch.Tensor)
    assert several.tolist() == [[2, 3], [2, 3]]
    slots.truncate(3)
    assert votes.voters(slots, 1) == 2
    slots.append(torch.tensor([[-1], [3]]), 1, 8)
    one = votes.voters(slots, 1)
    assert isinstance(one, torch.Tensor)
    assert one.tolist() == [[-1], [3]]


def test_each_head_counts_as_many_queries_as_it_is_told() -> None:
    """The number may differ from head to head."""
    ring = torch.zeros(1, 3, 1, votes.ring_bytes(10), dtype=torch.uint8)
    ones = torch.ones(1, 3, 10, 1, dtype=torch.bool)
    votes.record(ring, ones, torch.arange(7, 17)[None], 10)
    counted = votes.count(ring, torch.full((1, 3), 16), torch.tensor([[2, 10, 7]]), 10)
    assert counted.flatten().tolist() == [2, 10, 7]


def made_slots() -> Slots:
    """Two heads with holes in front, 6 slots, the last 3 new."""
    slots = Slots(1, 2, {}, {}, CPU)
    slots.append(torch.tensor([[-1, -1, 2, 7, 8, 9]]), 6, 6)
    return slots


def test_an_even_share_by_tokens_seen_or_by_keys_in_sight() -> None:
    """1 / (position + 1), and 1 / tokens held up to the query."""
    slots = made_slots()
    seen = votes.average_share(slots, 3, "seen")[0, 0]
    assert torch.equal(seen, 1 / torch.tensor([8.0, 9.0, 10.0]))
    cache = votes.average_share(slots, 3, "cache")[0, 1]
    assert torch.equal(cache, 1 / torch.tensor([2.0, 3.0, 4.0]))


def test_a_query_sees_tokens_up_to_itself() -> None:
    """Empty slots and later tokens are out of its sight."""
    found = torch.full((1, 2, 2, 6), 7, dtype=torch.uint8)
    votes.hide_unseen(found, made_slots())
    assert found[0, 1].tolist() == [[0, 0, 7, 7, 7, 0], [0, 0, 7, 7, 7, 7]]
