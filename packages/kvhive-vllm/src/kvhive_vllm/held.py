"""What the pages hold of one request, in the order of its slots.

Tokens lie in the order of their slots until an eviction is done in place: then those that lie
behind the new end move to where others went, and all the rest stay where they are.
"""

from __future__ import annotations

from functools import cached_property

import torch
from kvhive.kernels import Held
from kvhive.plan import Plan
from kvhive.stores.dense import DenseStore
from torch import Tensor

from kvhive_vllm.groups import Group

SHORT = 32_767  # tokens whose places fit 16 bits


class HeldPages(Held):
    """Of a group's S layers, fetched when they are looked at.

    blocks: int64, that hold `held` tokens. places: int16 or int32 `[S, K, m]`, where among these
    the tokens of the first m slots lie; later ones, or all with None, lie where their slots are.
    """

    def __init__(self, group: Group, blocks: Tensor, held: int, places: Tensor | None) -> None:
        self._group, self._blocks, self._held = group, blocks, held
        self._places = None if places is None else _lengthened(places, held)
        super().__init__(group.scale, group.written)

    def keys_of(self, layer: int) -> Tensor:
        """`[K, held, d]` of a layer of the model."""
        place = layer - self._group.first
        keys = self._group.pages[place].keys(self._blocks, self._held)
        return self._in_order(keys, place)

    @cached_property
    def keys(self) -> Tensor:
        """`[S, K, held, d]`."""
        return torch.stack([self.keys_of(layer) for layer in self._group.layers])

    @cached_property
    def values(self) -> Tensor:
        """`[S, K, held, e]`."""
        fetched = [pages.values(self._blocks, self._held) for pages in self._group.pages]
        parts = [self._in_order(part, place) for place, part in enumerate(fetched)]
        return torch.stack(parts)

    def whole(self) -> DenseStore:
        """Both, to be compacted."""
        parts = [self._both(place) for place in range(len(self._group.pages))]
        keys, values = (torch.stack(side) for side in zip(*parts, strict=True))
        store = DenseStore()
        store.append(keys, values, self._held)
        return store

    def move(self, blocks: Tensor, plan: Plan | None) -> None:
        """Write what a plan leaves, or all of it, to other blocks, one layer after the other."""
        for place, pages in enumerate(self._group.pages):
            keys, values = self._both(place)
            if plan is not None:
                keys, values = (_taken(part, plan.index[place]) for part in (keys, values))
            pages.write(blocks, keys, values)

    def close_up(self, plan: Plan) -> Tensor:
        """Move what a plan leaves behind the new end to where others went; the new `places`."""
        places = plan.index if self._places is None else self._places.gather(2, plan.index)
        layers, heads, source, target, places = closed_up(places, self._held)
        moved = layers.bincount(minlength=len(self._group.pages)).tolist()
        parts = zip(*(part.split(moved) for part in (heads, source, target)), strict=True)
        for pages, part in zip(self._group.pages, parts, strict=True):
            pages.move(self._blocks, *part)
        return places.to(torch.int16 if self._held <= SHORT else torch.int32)

    def _both(self, place: int) -> tuple[Tensor, Tensor]:
        """Keys `[K, held, d]` and values of the group's layer of that number."""
        keys, values = self._group.pages[place].both(self._blocks, self._held)
        return self._in_order(keys, place), self._in_order(values, place)

    def _in_order(self, part: Tensor, place: int) -> Tensor:
        """Of tokens as they lie in that layer's pages, `[K, held, d]`: as the slots are."""
        return part if self._places is None else _taken(part, self._places[place])


def closed_up(places: Tensor, held: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The moves that leave tokens, which lie at int64 `places` `[S, K, kept]` among `held`, at the
    first `kept` of these.

    Returns int64 layers, heads, source and target, an entry a move, sorted by layer, and then the
    new places. No target is a source.
    """
    kept = places.shape[-1]
    free = torch.ones(*places.shape[:2], held, dtype=torch.bool, device=places.device)
    free.scatter_(-1, places, False)
    layers, heads, target = free[..., :kept].nonzero(as_tuple=True)
    behind = places >= kept
    return layers, heads, places[behind], target, places.masked_scatter(behind, target)


def _lengthened(places: Tensor, held: int) -> Tensor:
    """int64 `[S, K, held]`."""
    layers, heads, known = places.shape
    later = torch.arange(known, held, device=places.device)
    return torch.cat([places.long(), later.expand(layers, heads, -1)], -1)


def _taken(part: Tensor, slots: Tensor) -> Tensor:
    """`[K, n, d]` -> `[K, m, d]`; slots: int64 `[K, m]`."""
    heads, held, width = part.shape
    rows = slots + torch.arange(heads, device=slots.device)[:, None] * held
    return part.reshape(-1, width).index_select(0, rows.flatten()).view(heads, -1, width)
