"""Dense store: keys and values as the model wrote them, in preallocated slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.kernels import Ask, Observed, attend, report
from kvhive.memory import take, widen
from kvhive.plan import Plan
from kvhive.stores._merging import fold
from kvhive.stores._ragged import RaggedStore
from kvhive.stores.base import STORES, LayerFacts, Store, StoreKind


class DenseStore(Store):
    """Keys `[b, K, room, d]` and values `[b, K, room, e]` in the model's dtype.

    On a GPU a prompt is taken over without a copy. Decoding writes in place, and room grows by a
    fixed number of slots, so that neither a step nor the memory held depends on more than the
    tokens kept.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys = torch.empty(0, 0, 0, 0)
        self._values = torch.empty(0, 0, 0, 0)

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """`[b, K, length, d]`, a view of the slots in use."""
        return self._keys.narrow(2, 0, self.length)

    @property
    def values(self) -> Tensor:
        """`[b, K, length, e]`, a view of the slots in use."""
        return self._values.narrow(2, 0, self.length)

    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens, with room for `room` slots; they take the dtype of what is held."""
        first, fresh = self.length, keys.shape[2]
        self.length = first + fresh
        if first == 0:
            self._keys, self._values = _adopt(keys, room), _adopt(values, room)
            return
        if self.length > self.room:
            self._keys = widen(self._keys, first, room)
            self._values = widen(self._values, first, room)
        self._keys.narrow(2, first, fresh).copy_(keys)
        self._values.narrow(2, first, fresh).copy_(values)

    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """One segment, and the kernel that suits the step."""
        return attend(query, self.keys, self.values, ask)

    def report(self, query: Tensor, ask: Ask) -> Observed:
        """What `attend` would report."""
        return report(query, self.keys, ask)

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are."""
        return self.keys, self.values

    def compact(self, plan: Plan, room: int) -> Store:
        """Fold by plain means, then gather; ragged where heads come to differ."""
        if plan.into is not None:
            self._keys, self._values = fold(self.keys, plan.into), fold(self.values, plan.into)
        rows = plan.rows(self.room)
        if plan.uneven:
            keys, values = self._keys.flatten(0, 2), self._values.flatten(0, 2)
            places = rows.view_as(plan.index)
            return RaggedStore.gathered(keys, values, places, plan.tally, room - plan.longest)
        self._keys = take(self._keys, rows, plan.longest, room)
        self._values = take(self._values, rows, plan.longest, room)
        self.length = plan.longest
        return self

    def resize(self, room: int) -> None:
        """Hold the same in room for `room` slots, no fewer than there are."""
        self._keys = widen(self._keys, self.length, room)
        self._values = widen(self._values, self.length, room)

    def take_keys(self, slots: Tensor) -> Tensor:
        """Keys `[N, d]` of the slots marked."""
        return self.keys[slots]

    def put_keys(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of the slots marked."""
        self.keys[slots] = keys

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        self._keys = self._keys.index_select(0, rows)
        self._values = self._values.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, spare room included."""
        return self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()


def _adopt(tensor: Tensor, room: int) -> Tensor:
    """Take a fresh tensor over as it is, unless room is wanted or it pins a larger buffer.

    On CPU it is copied into pages of its own (see `memory`): the heap it came from stays small.
    """
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    plain = alone and not tensor.is_inference()  # such a tensor could not be written to later
    if room == tensor.shape[2] and plain and tensor.device.type != "cpu":
        return tensor
    return widen(tensor, tensor.shape[2], room)


@STORES.register("dense")
@dataclass(frozen=True)
class Dense(StoreKind):
    """Keys and values in the model's own dtype."""

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> DenseStore:
        """An empty dense store."""
        return DenseStore()
