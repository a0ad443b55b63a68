"""Where kept keys stand, when positions are counted inside the cache.

The query stays where it is, and a key is turned on by one position for every newer token that is
dropped. That is done in place, once, when they are dropped: nothing is copied when keys are read.
Each turn rounds a 16-bit key by 0.2 % at most, at random, which is nothing for keys that are turned
a few times. Keys that live through many evictions (sinks, heavy hitters) would drift: from the
MOST-th turn on they are also held as they were then, and every further turn begins from that. So no
key is ever further from its exact place than MOST roundings take it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvhive.plan import Plan
from kvhive.rope import Rotation
from kvhive.slots import Column, Slots
from kvhive.stores import Store

MOST = 4  # turns in place: with more, single keys were found over 1 % away from their place
_TIMES = "turned"


def bytes_held_twice(width: int, dtype: torch.dtype) -> int:
    """Bytes that a key held twice takes beside its slot: as it was, and how far it has moved."""
    return width * dtype.itemsize + torch.int64.itemsize


class Turning:
    """Turns the keys of one layer that evictions have moved. rotation: None turns none."""

    def __init__(self, rotation: Rotation | None) -> None:
        self.rotation = rotation
        self.reset()

    def reset(self) -> None:
        """No key is held twice."""
        self._origins: Tensor | None = None  # [N, d], of the slots turned MOST times, in order
        self._since: Tensor | None = None  # int64 [N], by how much they have moved since

    @property
    def columns(self) -> Mapping[str, Column]:
        """How often a slot's key was turned, MOST at most."""
        return {} if self.rotation is None else {_TIMES: Column(torch.uint8)}

    def compact(self, store: Store, slots: Slots, plan: Plan, room: int, seen: int) -> Store:
        """Compact store and slots, and turn what moves. seen: tokens read; no turn is longer.

        Returns the store to go on with.
        """
        if self.rotation is None:
            slots.compact(plan, room)
            return store.compact(plan, room)
        moves = _moves(slots, plan)
        origin = self._origin_of(slots).gather(-1, plan.index)
        store = store.compact(plan, room)
        slots.compact(plan, room)
        self._turn(self.rotation, store, slots, moves, origin, seen)
        return store

    def _turn(
        self,
        rotation: Rotation,
        store: Store,
        slots: Slots,
        moves: Tensor,
        origin: Tensor,
        seen: int,
    ) -> None:
        """moves: int64 `[b, K, n]`, by how many positions each key held moves now; origin: int64
        `[b, K, n]`, its place among the origins held so far.
        """
        times, moving = slots[_TIMES], moves > 0
        old = slots.valid & (times >= MOST)
        times.add_(moving & (times < MOST))
        longlived = slots.valid & (times >= MOST)
        self._follow(store, longlived, old, moves, origin)
        if self._origins is not None and self._since is not None:
            store.put_keys(longlived, _turned(rotation, self._origins, self._since, seen))
        briefly = moving & ~longlived
        keys = store.take_keys(briefly)
        if len(keys):
            store.put_keys(briefly, _turned(rotation, keys, moves[briefly], seen))

    def _follow(
        self, store: Store, longlived: Tensor, old: Tensor, moves: Tensor, origin: Tensor
    ) -> None:
        """Bring the origins in line with the slots that live long, bool `[b, K, n]`; old: those
        that did before.
        """
        origins = store.take_keys(longlived)
        since = torch.zeros(len(origins), dtype=torch.int64, device=origins.device)
        if self._origins is not None and self._since is not None:
            held, place = old[longlived], origin[longlived]
            origins[held] = self._origins[place[held]]
            since[held] = self._since[place[held]]
        if len(origins):
            self._origins, self._since = origins, since + moves[longlived]
        else:
            self.reset()

    def _origin_of(self, slots: Slots) -> Tensor:
        """int64 `[b, K, n]`: the place of each slot's origin among those held."""
        held = slots.valid & (slots[_TIMES] >= MOST)
        return (held.flatten().cumsum(0) - 1).clamp_min(0).view(held.shape)

    def select_rows(self, slots: Slots, rows: Tensor) -> None:
        """Re-index the batch, before the slots do so themselves."""
        if self._origins is None or self._since is None:
            return
        held = (slots.valid & (slots[_TIMES] >= MOST)).index_select(0, rows)
        place = self._origin_of(slots).index_select(0, rows)[held]
        self._origins, self._since = self._origins[place], self._since[place]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys held twice."""
        held = [tensor for tensor in (self._origins, self._since) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _moves(slots: Slots, plan: Plan) -> Tensor:
    """int64 `[b, K, longest]`: how many newer tokens of its head each survivor loses."""
    dropped = slots.valid & ~plan.keep
    newer = dropped.flip(-1).cumsum(-1).flip(-1)
    moves = newer.gather(-1, plan.index)
    return moves if plan.empty is None else moves.masked_fill(plan.empty, 0)


def _turned(rotation: Rotation, keys: Tensor, by: Tensor, seen: int) -> Tensor:
    """Keys `[N, d]` turned by int64 `[N]` positions, float32 inside."""
    return rotation.turn(keys, *rotation.cos_sin(by, seen))
