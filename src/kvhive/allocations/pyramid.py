"""PyramidKV: much for the low layers, little for the high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.allocations._rounding import largest_remainder
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.spec import knob


@ALLOCATIONS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(Allocation):
    """Give layers budgets that fall in equal steps with depth; the mean over them is the budget.

    What a policy always keeps comes on top of the steps, so they are cut from the rest B: the last
    layer gets B / `beta` of it, the first the same amount below 2 B as that is above none. The
    first never gets more than a prompt has. A prompt of fewer than 2 B tokens gives every layer the
    budget. A prompt's own length counts, row by row.
    `schedule="exact"` rounds so that the total is exact; "reference" rounds each layer down, as the
    authors do, and lets the total drift; "kvpress" is NVIDIA's, whose steps include the window.

    Source: Cai et al. 2024, arXiv:2406.02069, section 4; `PyramidKVCluster` of KVCache-Factory.
    """

    source: ClassVar[str] = "arXiv:2406.02069"

    beta: int = knob(20, "how steep: the last layer gets 1 / beta of the mean; 1 is flat", least=1)
    min_past: int = knob(
        0, "least of a layer beside what is always kept, at most the mean; exact only", least=0
    )
    schedule: Literal["exact", "reference", "kvpress"] = knob(
        "exact", "an exact total, or the rounding of one of two implementations"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_past and self.schedule != "exact":
            raise ValueError(
                f"pyramid: min_past={self.min_past} is for schedule=exact alone, got "
                f"schedule={self.schedule}"
            )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base; the same for all heads of a layer. Exact with `schedule="exact"` alone; the
        others may give a layer one token less than `floor`, which is what is always kept.
        """
        window = floor - 1  # what is always kept
        by_layer = self._by_layer(facts.layers, budget, window, facts.seen)
        return by_layer[:, None].expand(-1, facts.kv_heads).clone()

    def _by_layer(self, layers: int, budget: int, window: int, seen: int) -> Tensor:
        if self.schedule == "kvpress":
            return _kvpress(layers, budget, window, seen, self.beta)
        past = budget - window
        if layers == 1 or seen < max(budget, 2 * past):
            return torch.full((layers,), budget)
        most = float(seen - window)
        if self.schedule == "reference":
            last, first = _ends(past, past // self.beta, most)
            step = (first - last) // (layers - 1)
            return (first - step * torch.arange(layers)).long() + window
        least = min(past, max(past / self.beta, self.min_past, 1))
        last, first = _ends(past, least, most)
        return largest_remainder(_falling(first, last, layers), past * layers) + window


def _ends(mean: int, least: float | int, most: float) -> tuple[float, float]:
    """The last and the first of equal steps with that mean, the first at most `most`."""
    first = min(2.0 * mean - least, most)
    return 2.0 * mean - first, first


def _falling(first: float, last: float, layers: int) -> Tensor:
    """float64 `[layers]`: from `first` to `last` in equal steps."""
    return first - torch.arange(layers).double() * ((first - last) / (layers - 1))


def _kvpress(layers: int, budget: int, window: int, seen: int, beta: int) -> Tensor:
    """int64 `[layers]`: `PyramidKVPress.get_layer_budget`."""
    last, first = _ends(budget, budget / beta, float(seen - window))
    if layers == 1 or not seen >= first >= last >= window:
        return torch.full((layers,), budget)
    return _falling(first, last, layers).round().long()
