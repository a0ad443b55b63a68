"""Where kept tokens stand: their place in the cache, as against the position they were written at.

For positions that are counted inside the cache. From one eviction to the next the newest token and
the slots behind a kept one grow together, so how far it must be turned stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.rope import Rotation
from kvhive.slots import Slots

FEW = 16  # one key in so many may be held twice, as written and turned


def count_moved(slots: Slots, seen: Tensor) -> int:
    """How many leading slots are not adjacent, in position, to all that follow them.

    seen: int64 `[b]`, real tokens of each row. The token to come follows them too, so everything
    has moved once the newest token is evicted.
    """
    position = slots.position
    newest = seen.to(position.device)[:, None, None] - 1
    behind = slots.length - 1 - torch.arange(slots.length, device=position.device)
    moved = (position >= 0) & (newest - position != behind)
    return int((moved.any(0).any(0) * (slots.length - behind)).max())


def turns(slots: Slots, moved: int) -> Tensor:
    """int32 `[b, K, moved]`: by how many positions the `moved` leading keys must be turned."""
    position = slots.position
    if slots.holes:
        newest = position.amax(-1, keepdim=True)
        behind = slots.count[..., None] - 1 - slots.rank[..., :moved]
    else:
        newest = position[..., -1:]
        behind = slots.length - 1 - torch.arange(moved, device=position.device)
    return (newest - position[..., :moved] - behind).clamp_min(0).int()


class Placement:
    """Turns the keys of one layer that evictions have moved, whenever they are read.

    What it needs for that is worked out once after each eviction: the turns and, where only a FEW
    keys have moved (StreamingLLM's sinks), the turned keys themselves.
    """

    def __init__(self, rotation: Rotation | None) -> None:
        self.rotation = rotation
        self.moved = 0  # leading slots whose keys must be turned
        self._evicted_to = 0  # slots that the last eviction left
        self.forget()

    def forget(self) -> None:
        """Work out anew what is needed; rows or devices have changed."""
        self._turns: Tensor | None = None
        self._turned: Tensor | None = None

    def update(self, slots: Slots, seen: Tensor) -> None:
        """Take notice of an eviction. seen: as in `count_moved`."""
        if self.rotation is not None:
            self.moved, self._evicted_to = count_moved(slots, seen), slots.length
            self.forget()

    def place(self, keys: Tensor, slots: Slots, seen: int) -> Tensor:
        """Keys `[b, K, n, d]` with those that moved turned to their place in the cache.

        seen: tokens read, padding included; no turn is longer.
        """
        if self.rotation is None or self.moved == 0:
            return keys
        turned = self._turned
        if turned is None:
            by = turns(slots, self.moved) if self._turns is None else self._turns
            turned = self.rotation.rotate(keys[:, :, : self.moved], by, seen)
            if slots.length > self._evicted_to:  # before, the newest token may have been evicted
                few = self.moved * FEW <= slots.length
                self._turned, self._turns = (turned, None) if few else (None, by)
        return torch.cat([turned, keys[:, :, self.moved :]], 2)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        held = [tensor for tensor in (self._turns, self._turned) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def gaps_closed(slots: Slots) -> Tensor | None:
    """Slot indices int64 `[b, K, n]` (-1: empty) with padding that came after tokens moved to the
    front of its row, where empty slots belong; None when there is none."""
    valid = slots.valid
    if not bool((valid[:, :, :-1] & ~valid[:, :, 1:]).any()):
        return None
    order = valid.to(torch.uint8).sort(dim=-1, stable=True).indices
    place = torch.arange(slots.length, device=valid.device)
    return order.masked_fill(place < (slots.length - slots.count)[..., None], -1)


def by_row(tensor: Tensor, order: Tensor) -> Tensor:
    """`[b, H, q, d]` with the queries of each row in the order of int64 `[b, q]`."""
    return tensor.gather(2, order[:, None, :, None].expand_as(tensor))
