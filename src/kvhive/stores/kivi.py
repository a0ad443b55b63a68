"""KIVI: keys in few bits per channel, values per token, the newest tokens exactly.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
arXiv:2402.02750; sinks that stay exact are an addition (`sink=0` is the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvhive.spec import knob
from kvhive.stores._packed import PackedKind, Packing
from kvhive.stores._rows import PerChannel, PerToken
from kvhive.stores._widths import GROUP, bits_knob, check_bits, group_for
from kvhive.stores.base import STORES


@STORES.register("kivi")
@dataclass(frozen=True)
class Kivi(PackedKind):
    """Keys leave the exact part `residual` at a time, in groups of tokens that share a grid in
    every channel; values leave it one by one, each with grids for groups of its channels. No token
    is quantised twice.

    An eviction leaves the rest of a group its codes and grid. Best with policies that compress
    once; below ones that evict while they decode ever fewer tokens share a grid: take `rotated`.
    """

    rewritable: ClassVar[bool] = False

    bits: int = bits_knob("of keys and of values, where nothing else is said")
    key_bits: int | None = bits_knob("of keys", None)
    value_bits: int | None = bits_knob("of values", None)
    group: int | None = knob(
        None, "tokens, or channels, that share a grid; none: 32, or what divides the head", least=8
    )
    residual: int = knob(32, "newest tokens that stay exact, a multiple of the group", least=8)
    sink: int = knob(4, "first tokens that stay exact", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, "bits", "key_bits", "value_bits")
        run = self.group or min(GROUP, self.residual)
        if self.residual % run:
            raise ValueError(
                f"kivi: residual must be a multiple of the group of {run} tokens, got "
                f"{self.residual}"
            )

    def packing(self, key_width: int, value_width: int) -> Packing:
        """See the base."""
        group_for(self.name, key_width, None)
        group = group_for(self.name, value_width, self.group)
        run = self.group or min(GROUP, self.residual)
        return Packing(
            keys=(PerChannel(self.key_bits or self.bits, run),),
            values=(PerToken(self.value_bits or self.bits, group),),
            sinks=self.sink,
            keys_due=self._keys_due,
            values_due=self._values_due,
        )

    def _keys_due(self, tail: int) -> int:
        return tail - tail % self.residual

    def _values_due(self, tail: int) -> int:
        return max(0, tail - self.residual)
