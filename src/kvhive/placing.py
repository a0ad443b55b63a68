"""Where kept tokens stand: their place in the cache, as against the position they were written at.

Pure functions of a layer's slots, for positions that are counted inside the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.rope import Rotation
from kvhive.slots import Slots


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


def place_keys(keys: Tensor, slots: Slots, moved: int, rotation: Rotation, seen: int) -> Tensor:
    """Keys `[b, K, n, d]` with the `moved` leading ones turned to their place in the cache.

    seen: tokens read, padding included; no turn is longer.
    """
    position = slots.position
    if slots.holes:
        newest = position.amax(-1, keepdim=True)
        behind = slots.count[..., None] - 1 - slots.rank[..., :moved]
    else:
        newest = position[..., -1:]
        behind = slots.length - 1 - torch.arange(moved, device=position.device)
    shift = (newest - position[..., :moved] - behind).clamp_min(0)
    turned = rotation.rotate(keys[:, :, :moved], shift, seen)
    return torch.cat([turned, keys[:, :, moved:]], 2)


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
