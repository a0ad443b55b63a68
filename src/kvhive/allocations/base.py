"""What an allocation is: it spreads the total budget over layers and KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.registry import Registry


@dataclass(frozen=True)
class Allocation:
    """Base of all allocations. Fields are hyper-parameters."""

    name: ClassVar[str]

    def spread(self, budget: int, layers: int, kv_heads: int, least: int) -> Tensor:
        """int64 `[layers, kv_heads]` with sum exactly `budget * layers * kv_heads`, each >=
        `least`.
        """
        raise TypeError(f"{type(self).__name__} does not spread a budget")


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
