"""L2 norm: short keys tend to be the ones that later queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvhive.kernels import Held, Needs
from kvhive.policies._parts.selection import joint_ranks, lengths, recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.policies.full import Full
from kvhive.slots import Slots
from kvhive.spec import knob

ROUNDING = 5e-7  # norms this close, relatively, are equal: a few roundings of float32


@POLICIES.register("l2norm")
@dataclass(frozen=True)
class L2Norm(Policy):
    """Keep the keys with the smallest Euclidean norm in each KV head; no attention is looked at.

    Ties: the older token. A rotation changes no norm, so it does not matter that keys are rotated.
    Layers in `skip_layers` keep everything and do not count towards the budget.

    Source: Devoto et al. 2024, arXiv:2406.11430; `l2_compress` of the authors' code, `KnormPress`
    of kvpress. State: none.
    """

    source: ClassVar[str] = "arXiv:2406.11430"
    cost: ClassVar[str] = "reads the keys once an eviction, no attention scores"

    skip_layers: tuple[int, ...] = knob(
        (), "layers left whole, counted from 0; the authors leave out [0, 1]", least=0
    )
    recent: int = knob(0, "most recent tokens kept whatever their norm", least=0)
    decode: Literal["stream", "none"] = knob(
        "stream", "evict while decoding too, or compress prompts only"
    )

    @property
    def needs(self) -> Needs:
        """The keys, when something must go."""
        return Needs(score_keys=True)

    @property
    def sizing(self) -> Sizing:
        """The window and one more token; decoding evicts only with `decode="stream"`."""
        return Sizing(least=self.recent + 1, decoding=self.decode == "stream")

    def for_layer(self, layer: int, layers: int, tokens: int | None) -> Policy:
        """Everything in the layers to skip.

        Raises `ValueError` when one of them does not exist.
        """
        if any(skipped >= layers for skipped in self.skip_layers):
            raise ValueError(
                f"l2norm: skip_layers must name layers below {layers}, all that this model has, "
                f"got {self.skip_layers}"
            )
        return Full() if layer in self.skip_layers else self

    def score(self, slots: Slots, held: Held) -> Tensor:
        """Minus the rank of the key's length, of all slots."""
        # In the first layer all keys of a word have one length, but for rounding.
        return -joint_ranks(lengths(held.keys), ROUNDING).float()

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The window, if there is to be one."""
        return recent(slots, self.recent)
