"""Inserting into a cascade of levels, all at once, against one token at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.policies._parts.cascade import insert


@dataclass
class SlowCascade:
    """One KV head, one token at a time; tokens are known by their time, 0 for the first."""

    sizes: list[int]
    strides: list[int]
    eager: int = -1
    levels: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.levels = [[] for _ in self.sizes]

    def insert(self, token: int, score: dict[int, float]) -> None:
        """Insert a token at its time."""
        moving = token
        for level, size, stride in zip(self.levels, self.sizes, self.strides, strict=True):
            opened = token % stride == 0 or token <= self.eager
            if not opened and level:
                if score[moving] >= score[level[-1]]:
                    level[-1] = moving
                return
            level.append(moving)
            if not opened or len(level) <= size:
                return
            moving = level.pop(0)


@dataclass
class FastCascade:
    """The same for one head by `insert`, any number of tokens at once."""

    sizes: list[int]
    strides: list[int]
    eager: int = -1
    held: list[int] = field(default_factory=list)
    level: list[int] = field(default_factory=list)

    def insert(self, tokens: range, score: dict[int, float]) -> None:
        """Insert tokens that follow each other."""
        time = torch.tensor([*self.held, *tokens])[None, None]
        level = torch.tensor([*self.level, *[-1] * len(tokens)])[None, None]
        scores = torch.tensor([[[score[t] for t in time[0, 0].tolist()]]])
        sizes = torch.tensor(self.sizes)[:, None, None]
        after, alive = insert(
            level, level < 0, time, scores, sizes, tuple(self.strides), torch.tensor([[self.eager]])
        )
        assert torch.equal(alive, after >= 0)
        self.held, self.level = time[alive].tolist(), after[alive].tolist()

    @property
    def levels(self) -> list[list[int]]:
        """What each level holds, oldest first."""
        return [
            [t for t, level in zip(self.held, self.level, strict=True) if level == index]
            for index in range(len(self.sizes))
        ]


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    strides=st.sampled_from(["double", "triple", "same", "odd"]),
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 20]), min_size=1, max_size=20),
    eager=st.sampled_from([-1, 5, 17]),
    seed=st.integers(0, 10**6),
)
def test_a_chunk_goes_in_as_its_tokens_would(
    sizes: list[int], strides: str, chunks: list[int], eager: int, seed: int
) -> None:
    """Scores with many ties that change from chunk to chunk, as they do after each step."""
    number = len(sizes)
    every = {
        "double": [2**i for i in range(number)],
        "triple": [3**i for i in range(number)],
        "same": [1] * number,
        "odd": [1, 3, 2, 7, 5][:number],
    }[strides]
    source = torch.Generator().manual_seed(seed)
    slow, fast = SlowCascade(sizes, every, eager), FastCascade(sizes, every, eager)
    start = 0
    for chunk in chunks:
        scores = torch.randint(0, 4, (start + chunk,), generator=source).tolist()
        score = {token: float(value) for token, value in enumerate(scores)}
        for token in range(start, start + chunk):
            slow.insert(token, score)
        fast.insert(range(start, start + chunk), score)
        assert fast.levels == slow.levels
        start += chunk


def test_the_same_scores_the_same_tokens_however_they_come() -> None:
    """One at a time, in chunks, or all at once."""
    source = torch.Generator().manual_seed(1)
    score = dict(enumerate(torch.rand(300, generator=source).tolist()))
    results = []
    for size in (1, 7, 64, 300):
        fast = FastCascade([6, 6, 6], [1, 2, 4])
        for start in range(0, 300, size):
            fast.insert(range(start, min(start + size, 300)), score)
        results.append(fast.levels)
    assert all(result == results[0] for result in results)


def test_equal_scores_leave_evenly_spaced_tokens() -> None:
    """With two sinks and four levels of four, after token 399."""
    fast = FastCascade([4] * 4, [1, 2, 4, 8])
    fast.insert(range(398), dict.fromkeys(range(398), 1.0))
    third, fourth = ([time + 2 for time in level[:4]] for level in fast.levels[2:])
    assert fourth == [349, 357, 365, 373]
    assert third == [377, 381, 385, 387]


def test_a_level_never_passes_on_what_is_newer_than_its_own() -> None:
    """Positions fall from level to level; the newest level is the window."""
    source = torch.Generator().manual_seed(2)
    score = dict(enumerate(torch.rand(200, generator=source).tolist()))
    fast = FastCascade([5, 4, 3, 2], [1, 2, 4, 8])
    for token in range(200):
        fast.insert(range(token, token + 1), score)
        assert fast.held == sorted(set(fast.held))
        assert fast.level == sorted(fast.level, reverse=True)
        assert fast.levels[0] == list(range(max(0, token - 4), token + 1))
        assert all(
            len(level) <= size for level, size in zip(fast.levels, [5, 4, 3, 2], strict=True)
        )


@pytest.mark.parametrize("smaller", [[3, 3, 3], [1, 1, 1], [2, 5, 1]])
def test_levels_that_shrink_hand_their_oldest_on(smaller: list[int]) -> None:
    """Less room, as when a turn wants some: each level keeps its newest, the last one lets go."""
    score = dict.fromkeys(range(200), 1.0)
    fast = FastCascade([5, 5, 5], [1, 2, 4])
    fast.insert(range(120), score)
    before = fast.held
    fast.sizes = smaller
    fast.insert(range(120, 120), score)
    assert [len(level) for level in fast.levels] == smaller
    assert fast.held == before[-sum(smaller) :]
    fast.insert(range(120, 200), score)
    assert [len(level) for level in fast.levels] == smaller


def test_reach_doubles_with_every_level() -> None:
    """About (2^levels - 1) windows back, where one window of all the room reaches `levels`."""
    fast = FastCascade([8] * 4, [1, 2, 4, 8])
    fast.insert(range(1000), dict.fromkeys(range(1000), 1.0))
    reach = 1000 - fast.held[0]
    assert 8 * 15 - 8 <= reach <= 8 * 15 + 8
    assert len(fast.held) == 32


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_are_independent(heads: int) -> None:
    """Levels of a size of their own, and scores of their own, for each head of each row."""
    source = torch.Generator().manual_seed(3)
    shape = (2, heads, 90)
    score = torch.rand(shape, generator=source)
    sizes = torch.randint(1, 6, (3, 2, heads), generator=source)
    time = torch.arange(90).expand(shape)
    pending = torch.ones(shape, dtype=torch.bool)
    eager = sizes.sum(0)
    level, _ = insert(torch.full(shape, -1), pending, time, score, sizes, (1, 2, 4), eager)
    for row in range(2):
        for head in range(heads):
            slow = SlowCascade(sizes[:, row, head].tolist(), [1, 2, 4], int(eager[row, head]))
            for token in range(90):
                slow.insert(token, dict(enumerate(score[row, head].tolist())))
            for index in range(3):
                mine = (level[row, head] == index).nonzero().flatten().tolist()
                assert mine == slow.levels[index]
