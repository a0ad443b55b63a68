"""The ring of votes against a dictionary."""

from __future__ import annotations

import pytest
import torch

from kvhive.policies._parts import votes
from kvhive.slots import Slots
from kvhive.step import Step
from tests.policies.rig import rows_of
from tests.policies.rows import in_blocks

CPU = torch.device("cpu")


def random_bits(source: torch.Generator, *shape: int) -> torch.Tensor:
    """bool, half of them true."""
    return torch.rand(shape, generator=source) < 0.5


@pytest.mark.parametrize("history", [1, 3, 8, 13, 16, 21, 61])
@pytest.mark.parametrize("seed", range(3))
def test_the_ring_remembers_the_last_queries(history: int, seed: int) -> None:
    """Steps of any length, rows of which some are padded, counted over any number of queries.

    It remembers as many as whole bytes have bits: `history` or a few more.
    """
    source = torch.Generator().manual_seed(seed)
    batch, heads, slots = 3, 2, 5
    most = 8 * votes.ring_bytes(history)
    assert history <= most < history + 8
    ring = torch.zeros(batch, heads, slots, votes.ring_bytes(history), dtype=torch.uint8)
    seen = torch.zeros(batch, dtype=torch.int64)
    remembered: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    for _ in range(12):
        rows = int(torch.randint(1, most + 1, (1,), generator=source))
        real = random_bits(source, batch, rows).sort(1).values  # padding on the left
        position = (seen[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        seen = seen + real.sum(1)
        vote = random_bits(source, batch, heads, rows, slots)
        votes.record(ring, vote, position)
        for row in range(batch):
            new = [vote[row, :, i] for i in range(rows) if bool(real[row, i])]
            remembered[row] = (remembered[row] + new)[-most:]
        for number in {1, (history + 1) // 2, history, most}:
            newest = (seen - 1)[:, None].expand(-1, heads)
            counted = votes.count(ring, newest, torch.full((batch, heads), number))
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
        votes.record(apart, vote, torch.full((3, 1), position))
        votes.record(together, vote, position)
        assert torch.equal(apart, together)


def told(slots: Slots, rows: int, threshold: votes.Threshold = "seen") -> list[list[int]] | int:
    """Positions of the voters of so many last rows, handed over together."""
    given = torch.zeros(slots.batch, 2, rows, slots.length)
    ((_, voters, _),) = votes.blocks(slots, in_blocks(given, rows), threshold)
    return voters if isinstance(voters, int) else voters.tolist()


def test_voters_are_told_by_one_number_where_all_rows_agree() -> None:
    """The last query's position; row by row once padding has been seen."""
    slots = Slots(2, 1, {}, {}, CPU)
    slots.append(Step.plain(0, 4), 8)
    assert told(slots, 1) == 3
    assert told(slots, 1, "cache") == [[3], [3]]
    assert told(slots, 2) == [[2, 3], [2, 3]]
    slots.truncate(3)
    assert told(slots, 1) == 2
    slots.append(rows_of(torch.tensor([[-1], [3]])), 8)
    assert told(slots, 1) == [[-1], [3]]


@pytest.mark.parametrize("threshold", ["seen", "cache"])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
def test_blocks_are_the_rows_one_after_another(size: int, threshold: votes.Threshold) -> None:
    """With the voters and even shares of each, the query heads beside the KV head they share."""
    slots = Slots(2, 2, {}, {}, CPU)
    slots.append(rows_of(torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])), 7)
    rows = torch.rand(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    given, voters, share = zip(*votes.blocks(slots, in_blocks(rows, size), threshold), strict=True)
    assert [len(one[0, 0, 0]) for one in given] == [min(size, 5 - i) for i in range(0, 5, size)]
    for head in range(6):
        got = torch.cat([one[:, head // 3, head % 3] for one in given], 1)
        assert torch.equal(got, rows[:, head])
    assert torch.cat(voters, 1).tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
    assert torch.equal(torch.cat(share, 2), votes.shares(slots, 5, threshold))


def test_one_query_has_the_share_it_has_among_several() -> None:
    """The share that all rows have in common is given as one number."""
    slots = Slots(2, 3, {}, {}, CPU)
    slots.append(Step.plain(0, 7), 8)
    ((_, _, share),) = votes.blocks(slots, in_blocks(torch.zeros(2, 3, 1, 7)), "seen")
    assert torch.equal(share.expand(2, 3, 1), votes.shares(slots, 1, "seen"))


def test_each_head_counts_as_many_queries_as_it_is_told() -> None:
    """The number may differ from head to head."""
    ring = torch.zeros(1, 3, 1, votes.ring_bytes(10), dtype=torch.uint8)
    ones = torch.ones(1, 3, 10, 1, dtype=torch.bool)
    votes.record(ring, ones, torch.arange(7, 17)[None])
    counted = votes.count(ring, torch.full((1, 3), 16), torch.tensor([[2, 10, 7]]))
    assert counted.flatten().tolist() == [2, 10, 7]


def made_slots() -> Slots:
    """Two heads with holes in front, 6 slots, the last 3 new."""
    slots = Slots(1, 2, {}, {}, CPU)
    slots.append(rows_of(torch.tensor([[-1, -1, 2, 7, 8, 9]])), 6)
    return slots


def test_an_even_share_by_tokens_seen_or_by_keys_in_sight() -> None:
    """1 / (position + 1), and 1 / tokens held up to the query."""
    slots = made_slots()
    seen = votes.shares(slots, 3, "seen")[0, 0]
    assert torch.equal(seen, 1 / torch.tensor([8.0, 9.0, 10.0]))
    cache = votes.shares(slots, 3, "cache")[0, 1]
    assert torch.equal(cache, 1 / torch.tensor([2.0, 3.0, 4.0]))


def test_a_query_sees_tokens_up_to_itself() -> None:
    """Empty slots and later tokens are out of its sight."""
    found = torch.full((1, 2, 2, 6), 7, dtype=torch.uint8)
    votes.hide_unseen(found, made_slots(), torch.tensor([[8, 9]]))
    assert found[0, 1].tolist() == [[0, 0, 7, 7, 7, 0], [0, 0, 7, 7, 7, 7]]


def test_queries_before_the_last_see_less() -> None:
    """Of any block of them, the tokens up to each."""
    found = torch.full((1, 2, 2, 6), 7, dtype=torch.uint8)
    votes.hide_unseen(found, made_slots(), torch.tensor([[2, 7]]))
    assert found[0, 1].tolist() == [[0, 0, 7, 0, 0, 0], [0, 0, 7, 7, 0, 0]]


def test_the_last_query_of_all_sees_all_that_is_held() -> None:
    """Alone, told by its position or row by row."""
    for voters in (9, torch.tensor([[9]])):
        found = torch.full((1, 2, 1, 6), 7, dtype=torch.uint8)
        votes.hide_unseen(found, made_slots(), voters)
        assert found[0, 1].tolist() == [[0, 0, 7, 7, 7, 7]]
