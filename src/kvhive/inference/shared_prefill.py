"""Several caches that read one prompt in one pass of the model, or that decode together.

What a recipe does to a prompt happens after attention, layer by layer, and changes nothing of the
pass itself. So one pass serves any number of recipes (`SharedPrefill`): each gets its own copy of
the keys and values, and of what attention reported in the form its policy asked for. Later, when
their caches differ, the recipes still share the model's matrix products (`SharedStep`): they are
rows of one batch, and only attention is done cache by cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvhive.cache.handoff import offer
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.layer import HiveLayer
from kvhive.kernels import NOTHING, Ask, Needs, Observed, attend, report
from kvhive.step import Step
from kvhive.stores.dense import Dense


def can_join(cache: HiveCache) -> bool:
    """Whether the cache can be one of several: not with layers that hold no keys and values."""
    return all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def reads_like_others(cache: HiveCache) -> bool:
    """Whether the pass over a prompt is the same with this cache as with the full one, and all."""
    once = cache.recipe.policy.reconstruction is None
    return once and can_join(cache) and isinstance(cache.recipe.store, Dense)


class SharedPrefill(Cache):
    """Reads one prompt (one row, one step) for all `caches`, which must be empty."""

    def __init__(self, caches: Sequence[HiveCache]) -> None:
        compressed = set(caches[0].compressed)
        layers: list[Any] = [
            (_ReadOnce if index in compressed else Together)(
                [cache.layers[index] for cache in caches]
            )
            for index in range(len(caches[0].layers))
        ]
        super().__init__(layers=layers)


class SharedStep(Cache):
    """Steps for all `caches` at once: the batch is their rows, one cache after the other.

    rows: how many each has. All must have seen equally many tokens.
    """

    def __init__(self, caches: Sequence[HiveCache], rows: Sequence[int]) -> None:
        compressed = set(caches[0].compressed)
        layers: list[Any] = [
            (_CompressedRows if index in compressed else _StockRows)(
                [cache.layers[index] for cache in caches], list(rows)
            )
            for index in range(len(caches[0].layers))
        ]
        super().__init__(layers=layers)


class Group(CacheLayerMixin):
    """One layer of several caches, in the place of one; its sizes are those of the first."""

    is_compileable = False

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.members = list(members)
        self.is_sliding = bool(self.members[0].is_sliding)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the members do it."""

    def check_model(self, config: object) -> None:
        """Raises `ValueError` when the members were made for another model."""
        for member in self.members:
            member.check_model(config)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self.members[0].get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that the next step's mask spans."""
        length, offset = self.members[0].get_mask_sizes(query_length)
        return int(length), int(offset)

    def get_max_length(self) -> int:
        """-1, or a stock layer's own limit."""
        return int(self.members[0].get_max_length())


class _ReadOnce(Group):
    """Attends once, as the full cache would; every member gets the report it needs."""

    members: list[HiveLayer]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the prompt's keys and values until its attention call, which finds this layer."""
        self._held = key_states, value_states
        return offer(key_states, self), value_states

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Causal attention `[b, H, q, d]` -> `[b, H, q, e]`; then every member evicts."""
        keys, values = self._held
        del self._held
        ask = Ask(Step.plain(0, query.shape[2]), scale)
        out, nothing = attend(query, keys, values, ask)
        reports: dict[Needs, Observed] = {NOTHING: nothing}
        for member in self.members:
            needs = member.policy.needs
            if needs not in reports:
                reports[needs] = report(query, keys, replace(ask, needs=needs))
            # A copy each: caches that keep everything would otherwise write into one another.
            member.replay(keys.clone(), values.clone(), reports[needs])
        return out


class Together(Group):
    """A stock layer of a hybrid model while reading: every member gets the same."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to all."""
        held = [
            member.update(key_states.clone(), value_states.clone(), *args, **kwargs)
            for member in self.members
        ]
        keys, values = held[0]
        return keys, values


class _StockRows(Group):
    """A stock layer of a hybrid model in a shared step: of equal lengths, to fit one batch."""

    def __init__(self, members: Sequence[Any], rows: list[int]) -> None:
        super().__init__(members)
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each member's rows to it."""
        parts = zip(
            self.members, key_states.split(self.rows), value_states.split(self.rows), strict=True
        )
        held = [member.update(keys, values, *args, **kwargs) for member, keys, values in parts]
        return torch.cat([keys for keys, _ in held]), torch.cat([values for _, values in held])


class _CompressedRows(_StockRows):
    """Compressed layers in a shared step: each attends to what it holds, and evicts."""

    members: list[HiveLayer]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each member's rows to it; attention then finds this layer."""
        parts = zip(
            self.members, key_states.split(self.rows), value_states.split(self.rows), strict=True
        )
        for member, keys, values in parts:
            member.update(keys, values)
        return offer(key_states, self), value_states

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Each member's attention for its rows, `[b, H, q, d]` -> `[b, H, q, e]`."""
        parts = zip(self.members, query.split(self.rows), strict=True)
        return torch.cat([member.attend(rows, scale) for member, rows in parts])
