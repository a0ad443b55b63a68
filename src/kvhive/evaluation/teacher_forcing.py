"""What compressed caches would attend to if every layer were handed the full cache's own states.

The full cache runs on; its queries, new keys and values go to the other caches too. So the
attention each layer loses, and by how much its output is off, is seen apart from errors of the
layers before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvhive.cache.handoff import offer
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.layer import HiveLayer
from kvhive.inference.driver import Driver
from kvhive.inference.shared_prefill import Group, Together, can_join
from kvhive.kernels import Ask, Needs, report
from kvhive.model.forward import forward
from kvhive.step import Step


@dataclass(frozen=True)
class Attended:
    """mass: share of the full cache's attention that falls on tokens still held, mean over layers
    and KV heads; least_mass: of the worst head. error: ||output - full output|| / ||full output||,
    mean over layers.
    """

    mass: float
    least_mass: float
    error: float


def attended_by(driver: Driver, caches: Sequence[HiveCache], ids: Sequence[int]) -> list[Attended]:
    """One step of `ids` on copies of `caches`, of which the first is the full one; a result for
    each.

    Raises `ValueError` for models whose caches cannot run side by side.
    """
    if not all(can_join(cache) for cache in caches):
        raise ValueError("fidelity needs a model whose layers all hold keys and values")
    copies = [cache.fork() for cache in caches]
    for copy in copies:
        copy.freeze()
    forced = _ForcedCaches(copies)
    forward(driver.model, forced, torch.tensor([ids]))
    layers = forced.compared
    results = []
    for place in range(len(copies)):
        shares = [share for layer in layers for share in layer.masses[place]]
        errors = [layer.errors[place] for layer in layers]
        results.append(Attended(mean(shares), min(shares), mean(errors)))
    return results


class _ForcedCaches(Cache):
    """The full cache's states for all caches. compared: the layers at which they are compared."""

    def __init__(self, caches: Sequence[HiveCache]) -> None:
        compressed = set(caches[0].compressed)
        layers: list[Any] = []
        self.compared: list[_ForcedLayer] = []
        for index in range(len(caches[0].layers)):
            members = [cache.layers[index] for cache in caches]
            if index in compressed:
                self.compared.append(_ForcedLayer(members))
                layers.append(self.compared[-1])
            else:
                layers.append(Together(members))
        super().__init__(layers=layers)


class _ForcedLayer(Group):
    """The full cache's layer attends; the others show what they would have made of it."""

    members: list[HiveLayer]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to all; attention then finds this layer."""
        self._before = [member.slots.position for member in self.members]
        for member in self.members:
            member.update(key_states.clone(), value_states.clone())
        self._keys = key_states
        return offer(key_states, self), value_states

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """The full cache's attention; measures the others on the way."""
        full = self.members[0]
        keys, fresh = self._keys, query.shape[2]
        ask = Ask(Step.plain(full.slots.length, fresh), scale, Needs(columns="sum"))
        report_of_all = report(query, torch.cat([full.store.view()[0], keys], 2), ask)
        columns = report_of_all.columns
        assert columns is not None
        total, new = columns.sum(-1), columns[..., -fresh:].sum(-1)
        outputs = [member.attend(query, scale) for member in self.members]
        truth = outputs[0].float()
        self.masses: list[list[float]] = []
        self.errors: list[float] = []
        for output, position in zip(outputs, self._before, strict=True):
            # A layer that shares another's tokens finds those of the step there already.
            before = (position >= 0) & (position < columns.shape[-1] - fresh)
            held = columns.gather(-1, position.long().clamp_min(0)) * before
            self.masses.append(((held.sum(-1) + new) / total).flatten().tolist())
            self.errors.append(float((output.float() - truth).norm() / truth.norm()))
        return outputs[0]
