"""What a side of a packed store holds between its exact ends: parts, each of tokens in one form."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from kvhive.kernels.packed import PackedRows


class Part(ABC):
    """Tokens of width d in R rows (batch row, KV head) that may hold different numbers.

    What changes a part returns the part to go on with, which may share tensors with the old one;
    nobody goes on with that.
    """

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """int64 `[R]` on the CPU: tokens of each row."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        lengths = self.lengths
        return int(lengths.max()) if len(lengths) else 0

    @abstractmethod
    def row(self, row: int, first: int, last: int) -> Tensor:
        """float32 `[last - first, d]`: tokens first..last-1 of a row, as attention reads them."""

    @abstractmethod
    def logits(self, query: Tensor, out: Tensor, at: Tensor) -> None:
        """Products of float32 queries `[R, G, d]` with the tokens of their row, written to float32
        `out[r, :, at[r] : at[r] + lengths[r]]`; `out` is `[R, G, N]`, `at` int64 `[R]` on the CPU.
        """

    @abstractmethod
    def mix(self, weights: Tensor, out: Tensor, at: Tensor) -> None:
        """Add to float32 `out` `[R, G, d]` the tokens of each row, weighed by float32
        `weights[r, :, at[r] : at[r] + lengths[r]]`.
        """

    @abstractmethod
    def joined(self, tokens: Tensor, lengths: Tensor) -> Part:
        """With tokens `[N, d]`, so many of each row (int64 `[R]` on the CPU), behind those held."""

    @abstractmethod
    def replaced(self, which: Tensor, tokens: Tensor) -> None:
        """Put tokens `[n, d]` in the place of those at int64 `which` `[n]`, counted through all
        rows.
        """

    @abstractmethod
    def kept(self, keep: Tensor) -> Part:
        """The tokens marked in bool `[N]`, those of one row after those of another."""

    @abstractmethod
    def selected(self, which: Tensor) -> Part:
        """Row i becomes what row `which[i]` was (int64 on the CPU)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor held, room to grow included."""

    @property
    def packed_rows(self) -> PackedRows | None:
        """The tokens as kernels read them, where they are in few bits; None: they are not."""
        return None


class Form(ABC):
    """How the tokens of a part are held. spreads: whether tokens are turned before they are
    rounded.
    """

    spreads: bool = False

    def turned(self, numbers: Tensor) -> Tensor:
        """Float32 `[..., d]` as tokens are before they are rounded."""
        return numbers

    def turned_back(self, numbers: Tensor) -> Tensor:
        """The reverse of `turned`."""
        return numbers

    @abstractmethod
    def part(self, tokens: Tensor, lengths: Tensor) -> Part:
        """Of tokens `[N, d]` of R rows, one row after another; lengths: int64 `[R]` on the CPU."""
