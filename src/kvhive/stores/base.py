"""What a store is: the way the tokens that survive are held in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvhive.registry import Registry


class Store(Protocol):
    """The storage of one layer: `length` slots of keys and values, compacted and moved together."""

    length: int

    @property
    def capacity(self) -> int:
        """Slots there is room for."""

    @property
    def keys(self) -> Tensor:
        """`[b, K, length, d]` as the kernel reads them."""

    @property
    def values(self) -> Tensor:
        """`[b, K, length, e]` as the kernel reads them."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, metadata and spare room included."""

    def append(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Add q tokens and make room for `capacity` slots."""

    def compact(self, index: Tensor, capacity: int) -> None:
        """Keep the slots at `index` int64 `[b, K, k]` (-1: an empty slot), drop all others."""

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was."""

    def to(self, device: torch.device | str) -> None:
        """Move everything held to `device`."""


@dataclass(frozen=True)
class StoreKind:
    """Base of all stores' settings: frozen fields are knobs, `new()` makes one layer's storage."""

    name: ClassVar[str]

    def new(self) -> Store:
        """An empty store for one layer."""
        raise TypeError(f"{type(self).__name__} does not make a store")


STORES: Registry[StoreKind] = Registry("store")
