"""What a store is: the way the tokens that survive are held in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvhive.registry import Registry


class Store(ABC):
    """The storage of one layer: `length` slots of keys and values, compacted and moved together."""

    length: int

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Slots there is room for."""

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """`[b, K, length, d]` as the kernel reads them."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """`[b, K, length, e]` as the kernel reads them."""

    @abstractmethod
    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        """The first `slots` keys and values, `length <= slots <= capacity`: what is behind is
        spare.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor held, metadata and spare room included."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Add q tokens and make room for `capacity` slots."""

    @abstractmethod
    def compact(self, index: Tensor, capacity: int) -> None:
        """Keep the slots at `index` int64 `[b, K, k]` (-1: an empty slot), drop all others."""

    @abstractmethod
    def merge(self, into: Tensor) -> None:
        """Fold slots into others: `into` int64 `[b, K, n]` names each one's target, -1 for none.

        A target's key and value become the plain mean of its own and all folded into it, summed in
        float32. Called right before the `compact` that drops what was folded.
        """

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was."""

    @abstractmethod
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
