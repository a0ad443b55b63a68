"""The methods once more, in plain Python, for one KV head: slow, obvious, of no common code.

Every oracle is told how many tokens arrive and how much attention each position received in the
step, and holds the positions that survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def pieces(tokens: list[int], size: int) -> list[list[int]]:
    """Consecutive runs of `size` tokens; the last may be shorter."""
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


@dataclass
class SlowScores:
    """Positions held and the attention each has received."""

    held: list[int] = field(default_factory=list)
    score: dict[int, float] = field(default_factory=dict)
    seen: int = 0
    sums: bool = True  # False: only what the last step brought

    def arrive(self, fresh: int, received: Sequence[float]) -> None:
        """Append `fresh` tokens; every token held gets what the step gave its position."""
        self.held += range(self.seen, self.seen + fresh)
        self.seen += fresh
        before = self.score if self.sums else {}
        self.score = {p: before.get(p, 0.0) + received[p] for p in self.held}

    def best(self, tokens: list[int]) -> int:
        """The token with the highest score, the oldest of equals."""
        return max(tokens, key=lambda p: (self.score[p], -p))


@dataclass
class SlowWindow:
    """Sinks and the most recent tokens."""

    sink: int
    recent: int
    held: list[int] = field(default_factory=list)
    seen: int = 0

    def step(self, fresh: int) -> None:
        """Append `fresh` tokens and evict."""
        self.held += range(self.seen, self.seen + fresh)
        self.seen += fresh
        middle = len(self.held) - self.sink - self.recent
        if middle > 0:
            del self.held[self.sink : self.sink + middle]


@dataclass
class SlowH2O(SlowScores):
    """Heavy hitters among the older tokens, and the most recent tokens."""

    heavy: int = 0
    recent: int = 0
    dropped: float = 0.0  # attention that tokens had received when they were dropped

    def step(self, fresh: int, received: Sequence[float]) -> None:
        """Append `fresh` tokens and evict."""
        self.arrive(fresh, received)
        if len(self.held) <= self.heavy + self.recent:
            return
        older = self.held[: len(self.held) - self.recent]
        ranked = sorted(older, key=lambda p: (-self.score[p], p))
        self.dropped += sum(self.score[p] for p in ranked[self.heavy :])
        gone = set(ranked[self.heavy :])
        self.held = [p for p in self.held if p not in gone]


@dataclass
class SlowBuzz(SlowScores):
    """Sinks, thinning sample, fresh tokens, window. Not `judged`: a block keeps its first token."""

    sink: int = 0
    window: int = 1
    threshold: int = 2
    stride: int = 3
    judged: bool = True
    drain: bool = True
    streamed: bool = False
    fit: bool = False
    sample: int = 0
    events: int = 0

    @property
    def budget(self) -> int:
        """The most tokens held after a step."""
        return self.sink + self.window + self.threshold

    @property
    def old_stride(self) -> int:
        """Of the old sample every so-manieth entry survives."""
        return -(-self.stride // 2)

    def step(self, fresh: int, received: Sequence[float]) -> None:
        """Append `fresh` tokens and evict."""
        self.arrive(fresh, received)
        if self.streamed:
            while len(self.held) > self.budget:
                self.event(self.budget + 1)
        elif len(self.held) > self.budget:
            self.event(len(self.held))
            while self.drain and self.sample > self.threshold:
                self.thin()

    def event(self, length: int) -> None:
        """One event on the first `length` tokens."""
        sinks = self.held[: self.sink]
        old = self.held[self.sink : self.sink + self.sample][:: self.old_stride]
        fresh = self.held[self.sink + self.sample : length - self.window]
        stride = self.stride
        if self.fit and self.sample == 0:
            stride = -(-len(fresh) // self.threshold)
        blocks = pieces(fresh, stride)
        picks = [self.best(block) if self.judged else block[0] for block in blocks]
        self.held = sinks + old + picks + self.held[length - self.window :]
        self.sample = len(old) + len(picks)
        self.events += 1

    def thin(self) -> None:
        """Thin the sample once more."""
        end = self.sink + self.sample
        stay = self.held[self.sink : end][:: self.old_stride]
        self.held[self.sink : end] = stay
        self.sample = len(stay)


@dataclass
class SlowLog(SlowScores):
    """Sinks, cells in generations, fresh tokens, window. An event rebuilds the list held."""

    sink: int = 0
    window: int = 1
    stride: int = 3
    cells: int | None = None  # None: from the room
    room: int | None = None  # None: by `cells` and the number of generations
    judged: bool = True
    history: list[tuple[int, int]] = field(
        default_factory=list
    )  # (generation, survivor), oldest first

    def depth(self) -> int:
        """Generations that the tokens seen can need."""
        digits, blocks = 1, -(-self.seen // self.stride)
        while 2**digits <= blocks:
            digits += 1
        return digits

    def limits(self) -> tuple[int, int]:
        """(room for history and fresh tokens, cells a generation)."""
        if self.room is None:
            assert self.cells is not None
            return self.cells * (self.stride + self.depth()), self.cells
        return self.room, self.cells or self.fitting_cells(self.room)

    def fitting_cells(self, room: int) -> int:
        """The most cells a generation so that all that can exist fill 3/4 of the room."""
        blocks = max(1, -(-self.seen // self.stride))
        for depth in range(1, blocks.bit_length() + 1):
            cells = max(1, 3 * room // (4 * depth))
            if (1 + (blocks - 1) // cells).bit_length() <= depth:
                return cells
        return 1

    def step(self, fresh: int, received: Sequence[float]) -> None:
        """Append `fresh` tokens and evict."""
        self.arrive(fresh, received)
        room, cells = self.limits()
        if len(self.held) > self.sink + room + self.window:
            self.event(room, cells)

    def event(self, room: int, cells: int) -> None:
        """Close cells, fold generations, and if need be merge the oldest cells."""
        rest = self.held[self.sink + len(self.history) :]
        blocks = pieces(rest[: len(rest) - self.window], self.stride)
        loose = blocks.pop() if blocks and len(blocks[-1]) < self.stride else []
        self.history += [(1, self.survivor(block)) for block in blocks]
        generation = 1
        while any(g >= generation for g, _ in self.history):
            self.fold(generation, cells)
            generation += 1
        excess = len(self.history) - (room - len(loose))
        if excess > 0:
            merged = self.history[: excess + 1]
            best = self.survivor([p for _, p in merged])
            self.history[: excess + 1] = [(merged[0][0], best)]
        kept = [p for _, p in self.history]
        self.held = self.held[: self.sink] + kept + loose + rest[len(rest) - self.window :]

    def fold(self, generation: int, cells: int) -> None:
        """Merge the oldest pairs of one generation until it has at most `cells` cells."""
        members = [cell for cell in self.history if cell[0] == generation]
        while len([cell for cell in self.history if cell[0] == generation]) > cells:
            first, second = members.pop(0), members.pop(0)
            place = self.history.index(first)
            best = self.survivor([first[1], second[1]])
            self.history[place : place + 2] = [(generation + 1, best)]

    def survivor(self, tokens: list[int]) -> int:
        """Of a cell: the best token, or without a judge the oldest."""
        return self.best(tokens) if self.judged else tokens[0]
