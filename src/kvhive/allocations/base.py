"""What an allocation is: it spreads the total budget over layers and KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvhive.registry import Registry
from kvhive.spec import Spec


@dataclass(frozen=True)
class Shape:
    """The heads among which a budget is shared: `kv_heads` in each of `layers` layers."""

    layers: int
    kv_heads: int


@dataclass(frozen=True)
class Allocation(Spec):
    """Base of all allocations. Fields are hyper-parameters.

    compete: who shares anew at each eviction, by the scores tokens have then: nobody ("none": the
    shares are fixed), the heads of a layer ("layer"), or all heads of the model ("model", which
    then evicts when its last layer has attended).
    """

    compete: ClassVar[Literal["none", "layer", "model"]] = "none"

    def shares(self, shape: Shape, budget: int, floor: int) -> Tensor:
        """int64 `[layers, kv_heads]` on the CPU, with sum exactly `budget * layers * kv_heads`.

        floor: the least any head needs, which is at most `budget`.
        """
        raise TypeError(f"{type(self).__name__} does not spread a budget")

    def at_eviction(
        self, scores: Sequence[Tensor], limits: Sequence[Tensor], floor: int
    ) -> list[Tensor]:
        """Shares among heads that compete: int64 `[b, K]` for each layer, on its device.

        scores: float32 `[b, K, n]` for each layer that competes, infinity for tokens that stay in
        any case, minus infinity for empty slots. limits: int64 `[b, K]`, what `shares` gave, whose
        sum over all heads of a row must be kept. Rows are judged independently.
        """
        raise TypeError(f"{type(self).__name__} does not share by scores")


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
