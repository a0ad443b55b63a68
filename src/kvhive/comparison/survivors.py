"""Which tokens a cache still holds, head by head: for the hive map and the shaded document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache


@dataclass(frozen=True)
class Survivors:
    """What every head holds.

    kept: bool `[rows, seen]`, one row for every KV head of the compressed layers, one column for
    every token seen. rows: the `(layer, head)` of each row, in the model's own numbering.
    """

    kept: Tensor
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, cache: HiveCache) -> Survivors:
        """What `cache` holds of the first row of its batch."""
        seen = int(cache.report().seen[0])
        kept, rows = [], []
        for layer, held in zip(cache.compressed, cache.positions_kept(), strict=True):
            for head, positions in enumerate(held[0]):
                present = torch.zeros(seen, dtype=torch.bool)
                present[positions[positions >= 0].long()] = True
                kept.append(present)
                rows.append((layer, head))
        return cls(torch.stack(kept), tuple(rows))

    @property
    def heads(self) -> Tensor:
        """int64 `[seen]`: how many heads hold each token."""
        return self.kept.sum(0)
