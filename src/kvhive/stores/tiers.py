"""Tiers: the best tokens in more bits, the next in fewer, instead of a hard cut.

Source: kvhive's own; the forms are those of KIVI (Liu et al. 2024, arXiv:2402.02750), and a token's
rank is that of the recipe's policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvhive.spec import knob
from kvhive.stores._packed import PackedKind, Packing
from kvhive.stores._rows import PerChannel, PerToken
from kvhive.stores._widths import GROUP, bits_knob, check_bits, due_in_groups, group_for
from kvhive.stores.base import STORES


@STORES.register("tiers")
@dataclass(frozen=True)
class Tiers(PackedKind):
    """Of the tokens that an eviction leaves, those that it would leave at a budget of `share` are
    held in `bits`, the rest in `rest_bits`. Keys have grids per channel, values per token.

    For what is compressed once, after a prompt. What is decoded later is held exactly until a group
    is full, and then in `bits`.
    """

    rewritable: ClassVar[bool] = False

    bits: int = bits_knob("of the best tokens")
    share: float = knob(0.1, "part of the tokens seen that are the best", least=0.0, most=1.0)
    rest_bits: int = bits_knob("of the others", 3)
    group: int | None = knob(
        None, "tokens, or channels, that share a grid; none: 32, or what divides the head", least=8
    )
    residual: int = knob(32, "newest tokens that stay exact, at least", least=0)
    sink: int = knob(4, "first tokens that stay exact", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, "bits", "rest_bits")

    @property
    def best(self) -> float | None:
        """See the base."""
        return self.share

    def packing(self, key_width: int, value_width: int) -> Packing:
        """See the base."""
        group_for(self.name, key_width, None)
        group = group_for(self.name, value_width, self.group)
        tiers = self.bits, self.rest_bits
        return Packing(
            keys=tuple(PerChannel(width, self.group or GROUP) for width in tiers),
            values=tuple(PerToken(width, group) for width in tiers),
            sinks=self.sink,
            keys_due=self._due,
            values_due=self._due,
            residual=self.residual,
        )

    def _due(self, tail: int) -> int:
        return due_in_groups(tail, self.residual)
