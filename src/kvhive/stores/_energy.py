"""How much channels of queries and keys weigh: ThinK's scores (arXiv:2407.21018, section 3).

A channel's contribution to all logits of a head is a matrix of rank one, queries times keys; its
Frobenius norm is the product of the two norms, so energies, summed squares, rank channels alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DRAFT = 64  # queries beyond the window that are looked at, in case the last ones are taken back


@dataclass(frozen=True, eq=False)
class QueryEnergy:
    """Over queries of every row: mean float32 `[b, K, d]`, of how many int64 `[b]`."""

    mean: Tensor
    count: Tensor

    def select_rows(self, rows: Tensor) -> QueryEnergy:
        """Row i becomes what row `rows[i]` was."""
        return QueryEnergy(self.mean.index_select(0, rows), self.count.index_select(0, rows))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.mean.untyped_storage().nbytes() + self.count.untyped_storage().nbytes()


@dataclass(frozen=True, eq=False)
class Latest:
    """Squares of a step's last queries, float32 `[b, K, m, d]`, means over the query heads that
    share a KV head; zero for padding. real: bool `[b, m]`. end: slots held when it was taken.
    """

    squares: Tensor
    real: Tensor
    end: int

    @classmethod
    def of(cls, query: Tensor, real: Tensor | None, kv_heads: int, window: int, end: int) -> Latest:
        """Of queries `[b, H, q, d]`; real: bool `[b, q]`, False for padding; None: all."""
        some = query[:, :, -(window + DRAFT) :].detach()
        squares = some.float().square().unflatten(1, (kv_heads, -1)).mean(2)
        if real is None:
            every = torch.ones(len(query), squares.shape[2], dtype=torch.bool, device=query.device)
            return cls(squares, every, end)
        real = real[:, -squares.shape[2] :]
        return cls(squares * real[:, None, :, None], real, end)

    def until(self, length: int) -> Latest:
        """Without the queries of slots beyond `length`, which were taken back."""
        left = max(0, self.real.shape[1] - max(0, self.end - length))
        return Latest(self.squares[:, :, :left], self.real[:, :left], min(self.end, length))

    def after(self, before: QueryEnergy | None, window: int) -> QueryEnergy:
        """Of the last `window` queries. Where this step brought fewer, what is missing is taken
        from those before it, by their mean.
        """
        squares, real = self.squares[:, :, -window:], self.real[:, -window:]
        total, count = squares.sum(2), real.sum(1)
        if before is not None:
            more = torch.minimum(before.count, window - count)
            total, count = total + before.mean * more[:, None, None], count + more
        return QueryEnergy(total / count.clamp_min(1)[:, None, None], count)

    def select_rows(self, rows: Tensor) -> Latest:
        """Row i becomes what row `rows[i]` was."""
        squares, real = self.squares.index_select(0, rows), self.real.index_select(0, rows)
        return replace(self, squares=squares, real=real)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.squares.untyped_storage().nbytes() + self.real.untyped_storage().nbytes()


def key_energy(keys: Tensor, held: Tensor | None) -> tuple[Tensor, int]:
    """float32 `[R, d]`, the mean square of each channel of keys `[R, n, d]`, and the most tokens
    that a row holds. held: bool `[R, n]`, False where there is none; None: all are.
    """
    squares = keys.float().square()
    if held is None:
        return squares.mean(1), keys.shape[1]
    count = held.sum(1)
    total = squares.masked_fill_(~held[..., None], 0).sum(1)
    return total / count.clamp_min(1)[:, None], int(count.max())


def best_channels(score: Tensor, pruned: int) -> Tensor:
    """int16 `[R, d - pruned]`, ascending: all but the channels of the lowest score `[R, d]`.

    Of equal ones the lower channel goes first.
    """
    order = score.sort(dim=-1, stable=True).indices
    return order[:, pruned:].sort(dim=-1).values.to(torch.int16)
