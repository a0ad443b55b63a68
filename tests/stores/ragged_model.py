"""What a store and its slots must hold after any operations, in plain lists."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count

Token = tuple[int, int]  # the number of its key, and its position
EMPTY: Token = (-1, -1)
Mask = Sequence[Sequence[Sequence[bool]]]


class RaggedModel:
    """`heads[row][head]` are the tokens that a KV head holds, oldest first.

    seen: tokens that every row was given and that were not taken back. fresh: the newest of these
    that no eviction has come after. length: slots of each head, empty ones in front included: the
    fullest head's tokens at the last eviction, and what came since.
    """

    def __init__(self, batch: int, heads: int) -> None:
        self.heads: list[list[list[Token]]] = [[[] for _ in range(heads)] for _ in range(batch)]
        self.seen = self.fresh = self.length = 0
        self._numbers = count()

    def append(self, number: int) -> None:
        """Give every head so many new tokens, each with a key of its own."""
        for row in self.heads:
            for tokens in row:
                tokens += [(next(self._numbers), self.seen + new) for new in range(number)]
        self.seen += number
        self.fresh += number
        self.length += number

    def compact(self, keep: Mask) -> None:
        """Keep the tokens marked; marks are those of `padded`."""
        for row, marks in zip(self.heads, keep, strict=True):
            for tokens, mark in zip(row, marks, strict=True):
                own = mark[self.length - len(tokens) :]
                tokens[:] = [token for token, stays in zip(tokens, own, strict=True) if stays]
        self.fresh = 0
        self.length = max(len(tokens) for row in self.heads for tokens in row)

    def truncate(self, dropped: int) -> None:
        """Take the newest tokens back."""
        for row in self.heads:
            for tokens in row:
                del tokens[len(tokens) - dropped :]
        self.seen -= dropped
        self.fresh -= dropped
        self.length -= dropped

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.heads = [[list(tokens) for tokens in self.heads[row]] for row in rows]

    def fork(self) -> RaggedModel:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin.select_rows(range(len(self.heads)))
        return twin

    def padded(self) -> list[list[list[Token]]]:
        """`[row][head][slot]`, right-aligned."""
        return [
            [[EMPTY] * (self.length - len(tokens)) + tokens for tokens in row] for row in self.heads
        ]
