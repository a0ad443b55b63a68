"""What a packed store holds exactly: the first tokens of every row and the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.memory import widen

WASTED = 48  # columns of room that may stay behind unused


class Exact:
    """Tokens `[R, room, d]` in the model's dtype: columns 0 to `sinks - 1` are the first tokens of
    each row, the others, up to `used`, its newest; both right-aligned.

    missing: bool `[R, used]`, True for columns that hold no token of their row; None: all do.
    """

    def __init__(self, tokens: Tensor, missing: Tensor | None = None, sinks: int = 0) -> None:
        self._tokens, self.sinks, self.missing = tokens, sinks, missing
        self.used = tokens.shape[1]

    @property
    def room(self) -> int:
        """Columns there is room for."""
        return self._tokens.shape[1]

    @property
    def tail(self) -> int:
        """Columns of newest tokens."""
        return self.used - self.sinks

    @property
    def tokens(self) -> Tensor:
        """`[R, used, d]`, a view."""
        return self._tokens.narrow(1, 0, self.used)

    @property
    def empty(self) -> Tensor | None:
        """int64 `[R]` on the CPU: columns of the tail that are missing; None: none is."""
        return None if self.missing is None else self.missing[:, self.sinks :].sum(1).cpu()

    def set(self, marked: Tensor, tokens: Tensor) -> None:
        """Put tokens `[n, d]` in the columns marked in bool `[R, used]`, row by row."""
        self._tokens[:, : self.used][marked] = tokens.to(self._tokens.dtype)

    def append(self, fresh: Tensor, ahead: int) -> None:
        """Newest tokens `[R, q, d]`; where there is too little room, make some for `ahead` more."""
        more = fresh.shape[1]
        if self.used + more > self.room:
            room = self.used + more + ahead
            self._tokens = widen(self._tokens[:, None], self.used, room)[:, 0]
        self._tokens.narrow(1, self.used, more).copy_(fresh)
        self.used += more
        if self.missing is not None:
            self.missing = torch.nn.functional.pad(self.missing, (0, more))

    def oldest(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The oldest `count` columns of the tail, `[R, count, d]`, and which are missing."""
        cut = slice(self.sinks, self.sinks + count)
        return self._tokens[:, cut], None if self.missing is None else self.missing[:, cut]

    def drop_oldest(self, count: int) -> None:
        """Forget the oldest `count` columns of the tail, and give back room that is not needed."""
        left = self._tokens[:, self.sinks + count : self.used].clone()
        first = self._tokens[:, : self.sinks]
        self.used -= count
        if self.room > self.used + WASTED:
            self._tokens = torch.cat([first, left], 1)
        else:
            self._tokens[:, self.sinks : self.used] = left
        if self.missing is not None:
            behind = self.missing[:, self.sinks + count :]
            missing = torch.cat([self.missing[:, : self.sinks], behind], 1)
            self.missing = missing if bool(missing.any()) else None

    def tighten(self) -> None:
        """Give back all room that is not used."""
        if self.room > self.used:
            self._tokens = self.tokens.clone()

    def holds_newest(self, count: int) -> bool:
        """Whether the newest `count` tokens of every row are in the tail."""
        if count > self.tail:
            return False
        return self.missing is None or not bool(self.missing[:, self.used - count :].any())

    def drop_newest(self, count: int) -> None:
        """Forget the newest columns; every row must have as many in the tail."""
        self.used -= count
        if self.missing is not None:
            self.missing = self.missing[:, : self.used]

    def keep(self, marked: Tensor) -> None:
        """Keep the columns marked in bool `[R, used]`; those that are missing are not."""
        tail = marked[:, self.sinks :]
        first, head = aligned(marked[:, : self.sinks])
        last, end = aligned(tail)
        places = torch.cat([first, last + self.sinks], 1)
        missing = torch.cat([head, end], 1)
        self._tokens = torch.take_along_dim(self.tokens, places[..., None], 1)
        self.used, self.sinks = places.shape[1], first.shape[1]
        self.missing = missing if bool(missing.any()) else None

    def select(self, which: Tensor) -> None:
        """Row i becomes what row `which[i]` was."""
        self._tokens = self._tokens.index_select(0, which)
        if self.missing is not None:
            self.missing = self.missing.index_select(0, which)
            self.keep(~self.missing)  # columns that only rows had that are gone go too

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, room included."""
        own = self._tokens.untyped_storage().nbytes()
        return own + (0 if self.missing is None else self.missing.untyped_storage().nbytes())


def aligned(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool `[R, n]`: int64 `[R, most]`, the places marked, ascending and right-aligned, and bool
    `[R, most]`, True where a row has fewer.
    """
    counts = marked.sum(1)
    most = int(counts.max()) if marked.numel() else 0
    order = marked.to(torch.uint8).sort(dim=1, stable=True).indices
    missing = torch.arange(most, device=marked.device) < (most - counts)[:, None]
    return order[:, marked.shape[1] - most :], missing
