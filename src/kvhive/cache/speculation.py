"""Steps that may be taken back: queries of speculative decoding, until it is known which count."""

from __future__ import annotations

import torch
from torch import Tensor


class Recording:
    """The queries since the last commit, so that those which stay can vote after all."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, float, Tensor | None]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, query: Tensor, scale: float, real: Tensor | None) -> None:
        """One step: query `[b, H, q, d]`, its scale, and bool `[b, q]`, False for padding."""
        self._steps.append((query, scale, real))

    def take(self, removed: int) -> tuple[Tensor, float, Tensor | None] | None:
        """All steps as one without the last `removed` queries; nothing is recorded afterwards."""
        steps, self._steps = self._steps, []
        fresh = sum(query.shape[2] for query, _, _ in steps) - removed
        if fresh <= 0:
            return None
        query = torch.cat([query for query, _, _ in steps], dim=2)[:, :, :fresh]
        if all(real is None for _, _, real in steps):
            return query, steps[0][1], None
        parts = [
            query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
            if real is None
            else real
            for query, _, real in steps
        ]
        return query, steps[0][1], torch.cat(parts, dim=1)[:, :fresh]

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was."""
        self._steps = [
            (query[rows], scale, None if real is None else real[rows])
            for query, scale, real in self._steps
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the queries held."""
        return sum(query.untyped_storage().nbytes() for query, _, _ in self._steps)
