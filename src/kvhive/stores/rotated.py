"""Rotated: keys and values spread by a Hadamard matrix and quantised token by token.

Sources: the rotation is that of QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); quantising single
tokens below an eviction is Scissorhands' (Liu et al. 2023, arXiv:2305.17118).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.spec import knob
from kvhive.stores._packed import PackedKind, Packing
from kvhive.stores._rows import PerToken
from kvhive.stores._widths import bits_knob, check_bits, due_in_groups, group_for
from kvhive.stores.base import STORES


@STORES.register("rotated")
@dataclass(frozen=True)
class Rotated(PackedKind):
    """Every token has grids of its own, so that appending and every eviction leave the codes of all
    others as they are: the store for policies that evict while they decode. Queries are turned as
    keys are, and outputs turned back, so that nothing is multiplied by the matrix but what a step
    brings.
    """

    bits: int = bits_knob("of keys and of values")
    group: int | None = knob(
        None, "channels that share a grid; none: 32, or what divides the head", least=8
    )
    residual: int = knob(32, "newest tokens that stay exact, at least", least=0)
    sink: int = knob(4, "first tokens that stay exact", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, "bits")

    def packing(self, key_width: int, value_width: int) -> Packing:
        """See the base."""
        forms = [
            PerToken(self.bits, group_for(self.name, width, self.group), spreads=True)
            for width in (key_width, value_width)
        ]
        return Packing((forms[0],), (forms[1],), self.sink, self._due, self._due, self.residual)

    def _due(self, tail: int) -> int:
        return due_in_groups(tail, self.residual)
