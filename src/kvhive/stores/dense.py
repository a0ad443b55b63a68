"""Dense store: keys and values as the model wrote them, in preallocated slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.slots import take, widen
from kvhive.stores.base import STORES, Store, StoreKind
from kvhive.stores.merging import fold


class DenseStore(Store):
    """Keys `[b, K, capacity, d]` and values `[b, K, capacity, e]` in the model's dtype.

    On a GPU a prompt is taken over without a copy. Decoding writes in place, and room grows by a
    fixed number of slots, so that neither a step nor the memory held depends on more than the
    tokens kept.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """`[b, K, length, d]`, a view of the slots in use."""
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """`[b, K, length, e]`, a view of the slots in use."""
        assert self._values is not None
        return self._values[:, :, : self.length]

    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        """Views of the first `slots` keys and values, spare room included."""
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, :slots], self._values[:, :, :slots]

    def append(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Add q tokens, keys `[b, K, q, d]` and values `[b, K, q, e]`, with room for `capacity`
        slots.
        """
        first, last = self.length, self.length + keys.shape[2]
        if self._keys is None or self._values is None or self.length == 0:
            self._keys, self._values = _adopt(keys, capacity), _adopt(values, capacity)
        else:
            if capacity != self.capacity:
                self._keys = widen(self._keys, first, capacity)
                self._values = widen(self._values, first, capacity)
            self._keys[:, :, first:last] = keys
            self._values[:, :, first:last] = values
        self.length = last

    def compact(self, index: Tensor, capacity: int) -> None:
        """Keep the slots at `index` int64 `[b, K, k]` (-1: an empty slot), drop all others."""
        assert self._keys is not None and self._values is not None
        source = index.clamp_min(0)
        self._keys = take(self._keys, source, capacity)
        self._values = take(self._values, source, capacity)
        self.length = index.shape[-1]

    def merge(self, into: Tensor) -> None:
        """Fold slots into others (`into` int64 `[b, K, n]`, -1 for none) by plain means."""
        self._keys, self._values = fold(self.keys, into), fold(self.values, into)

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        assert self._keys is not None and self._values is not None
        self._keys = self._keys.index_select(0, rows)
        self._values = self._values.index_select(0, rows)

    def to(self, device: torch.device | str) -> None:
        """Move everything held to `device`."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.to(device)
            self._values = self._values.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, spare room included."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()


def _adopt(tensor: Tensor, capacity: int) -> Tensor:
    """Take a fresh tensor over as it is, unless room is wanted or it pins a larger buffer.

    On CPU it is copied into pages of its own (see `memory`): the heap it came from stays small.
    """
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if capacity == tensor.shape[2] and alone and tensor.device.type != "cpu":
        return tensor
    return widen(tensor, tensor.shape[2], capacity)


@STORES.register("dense")
@dataclass(frozen=True)
class Dense(StoreKind):
    """Keys and values in the model's own dtype."""

    def new(self) -> DenseStore:
        """An empty dense store."""
        return DenseStore()
