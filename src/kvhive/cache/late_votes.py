"""Votes that wait: decoded queries of one layer that vote together, a few tokens late.

Where a policy takes several queries as it takes one after the other (`Needs.together`), attention
need not report at every token. Nothing that a waiting query saw may go before it has voted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.step import Step

FEW = 64  # slots held for each query that waits


class LateVotes:
    """The queries that have not voted yet, oldest first, each `[b, H, 1, d]`.

    scale: multiplies the product of a query and a key.
    """

    def __init__(self) -> None:
        self.queries: list[Tensor] = []
        self.scale = 1.0

    def __len__(self) -> int:
        return len(self.queries)

    def add(self, query: Tensor, scale: float) -> None:
        """Let one more wait."""
        self.queries.append(_alone(query.detach()))
        self.scale = scale

    def take(self, seen: int) -> tuple[Step, Tensor]:
        """The step that they make together, the last of `seen` tokens, and its queries
        `[b, H, count, d]`; nobody waits afterwards.
        """
        query, self.queries = torch.cat(self.queries, 2), []
        count = query.shape[2]
        return Step.plain(seen - count, count, "decode"), query

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        return sum(query.untyped_storage().nbytes() for query in self.queries)


def patience(together: int, held: int) -> int:
    """Queries that may wait: few beside the slots `held`."""
    return min(together, held // FEW)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is part of something larger that it would keep alive."""
    whole = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if whole else tensor
