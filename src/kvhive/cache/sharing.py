"""Layers without tokens of their own: they attend to what an earlier layer holds.

That layer appends the step's tokens, votes and evicts as any other, but not before the last of
those that read it has attended: that one closes the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvhive.cache.handoff import offer
from kvhive.cache.interface import CacheLayer
from kvhive.cache.layer import HiveLayer
from kvhive.cache.modes import plain
from kvhive.slots import Slots
from kvhive.step import Step


class SharedLayer(CacheLayer):
    """A layer that attends to the tokens of `source`. closes: those layers whose step is over when
    this one has attended.
    """

    def __init__(self, source: HiveLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.source, self.closes = source, list[HiveLayer]()
        self.policy, self.progress, self.place = source.policy, source.progress, source.place
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the source does it."""

    def reset(self) -> None:
        """Back to the start of a step; the source forgets by itself."""
        self._waiting: tuple[Tensor, Tensor] | None = None  # handed in, not attended yet
        self._taken: Step | None = None  # attended to last

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the source's tokens lie."""
        return self.source.device

    @property
    def slots(self) -> Slots:  # type: ignore[override]
        """The source's."""
        return self.source.slots

    @property
    def evicted(self) -> bool:  # type: ignore[override]
        """Whether the source ever dropped anything."""
        return self.source.evicted

    @property
    def positions(self) -> Tensor:
        """int32 `[b, K, n]` on the CPU: of the tokens attended to, -1 for empty slots."""
        return self.source.positions

    @property
    def full_nbytes(self) -> int:
        """Bytes of keys and values that the full cache would hold here: as many as in the source,
        whose sizes are the same.
        """
        return self.source.full_nbytes

    def get_seq_length(self) -> int:
        """Tokens seen: those of the step under way count once they were handed in here."""
        step, seen = self.source.step, self.source.get_seq_length()
        handed = self._waiting is not None or step is self._taken
        return seen if step is None or handed else seen - step.fresh

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take notice that this layer's queries come next; its keys and values will be dropped.

        They are returned as they are, the keys carrying this layer, as `HiveLayer.update` does.
        """
        self._waiting = key_states.detach(), value_states.detach()
        return offer(key_states, self), value_states

    def check_model(self, config: object) -> None:
        """Raises `ValueError` unless this is the config of the model the cache was made for."""
        self.source.check_model(config)

    @plain
    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Attention of the step's queries, `[b, H, q, d]` -> `[b, H, q, e]`, to what the source
        holds; padding is what it was there.

        Raises `ValueError` for tokens that the source was not given in the same step.
        """
        if self._waiting is None:
            raise ValueError("attention came twice for the same tokens of this cache")
        (keys, _), self._waiting = self._waiting, None
        step = self.source.step
        if step is None or step.fresh != keys.shape[2]:
            raise ValueError(
                f"a layer that shares the tokens of another was given {keys.shape[2]} out of turn: "
                "all layers take every step one after the other; make a new cache, or call reset()"
            )
        self.source.check_shape(keys)
        self._taken = step
        out = self.source.lend(query, scale)
        for layer in self.closes:
            layer.close()
        return out

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing: the source follows beams by itself."""


def all_layers(own: Sequence[HiveLayer], sources: Sequence[int]) -> list[HiveLayer | SharedLayer]:
    """Every compressed layer, in order: those in `own`, and between them those that share.

    sources: for each layer the place of the one whose tokens it attends to, itself for `own`.
    """
    holding = dict(zip(holders(sources), own, strict=True))
    layers = [holding.get(place) or SharedLayer(holding[src]) for place, src in enumerate(sources)]
    for place, end in closing(sources).items():
        reader = layers[end]
        if isinstance(reader, SharedLayer):
            holding[place].lent = True
            reader.closes.append(holding[place])
    return layers


def holders(sources: Sequence[int]) -> list[int]:
    """The places of the layers that hold tokens themselves."""
    return [place for place, source in enumerate(sources) if place == source]


def closing(sources: Sequence[int]) -> dict[int, int]:
    """For each layer that holds tokens, the place of the layer with which its step ends: the last
    that attends to it. With the last of all ends that of the last one that holds any, because it
    may evict for all of them.
    """
    ends = {source: place for place, source in enumerate(sources)}
    ends[max(ends)] = len(sources) - 1
    return dict(sorted(ends.items()))
