"""L2 norm: short keys tend to be the ones that later queries attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvhive.kernels import Needs, Observed
from kvhive.policies._parts.selection import joint_ranks, keep_top, lengths, recent
from kvhive.policies.base import POLICIES, Policy, at_least, knob, one_of
from kvhive.policies.full import Full
from kvhive.slots import Column, Slots

ROUNDING = 5e-7  # norms this close, relatively, are equal: a few roundings of float32


@POLICIES.register("l2norm")
@dataclass(frozen=True)
class L2Norm(Policy):
    """Keep the keys with the smallest Euclidean norm in each KV head; no attention is looked at.

    Ties: the older token. A rotation changes no norm, so it does not matter that keys are rotated.
    Layers in `skip_layers` keep everything and do not count towards the budget.

    Source: Devoto et al. 2024, arXiv:2406.11430; `l2_compress` of the authors' code, `KnormPress`
    of kvpress. State: float32 norm per slot, measured when something must go.
    """

    source: ClassVar[str] = "arXiv:2406.11430"
    cost: ClassVar[str] = "reads the keys once an eviction, no attention scores; 4 bytes a slot"

    skip_layers: tuple[int, ...] = knob(
        (), "layers left whole, counted from 0; the authors leave out [0, 1]"
    )
    recent: int = knob(0, "most recent tokens kept whatever their norm")
    decode: Literal["stream", "none"] = knob(
        "stream", "evict while decoding too, or compress prompts only"
    )

    def __post_init__(self) -> None:
        at_least("l2norm", "recent", self.recent, 0)
        one_of("l2norm", "decode", self.decode, ("stream", "none"))
        if any(layer < 0 for layer in self.skip_layers):
            raise ValueError(f"l2norm: skip_layers must be at least 0, got {self.skip_layers}")

    @property
    def needs(self) -> Needs:
        """The keys."""
        return Needs(keys=True)

    @property
    def columns(self) -> Mapping[str, Column]:
        """The norm of the slot's key at the last eviction."""
        return {"norm": Column()}

    @property
    def least_budget(self) -> int:
        """The window and one more token."""
        return self.recent + 1

    def acts(self, decoding: bool) -> bool:
        """In decoding only with `decode="stream"`."""
        return not decoding or self.decode == "stream"

    def for_layer(self, layer: int, layers: int) -> Policy:
        """Everything in the layers to skip.

        Raises `ValueError` when one of them does not exist.
        """
        if any(skipped >= layers for skipped in self.skip_layers):
            raise ValueError(
                f"l2norm: skip_layers must name layers below {layers}, all that this model has, "
                f"got {self.skip_layers}"
            )
        return Full() if layer in self.skip_layers else self

    def weigh(self, slots: Slots, held: Observed) -> None:
        """Measure the keys."""
        assert held.keys is not None
        slots["norm"].copy_(lengths(held.keys))

    def select(self, slots: Slots, budget: Tensor) -> Tensor:
        """The shortest keys, and the window if there is to be one."""
        window = recent(slots, self.recent)
        # In the first layer all keys of a word have one length, but for rounding.
        length = joint_ranks(slots["norm"], ROUNDING)
        return window | keep_top(-length, slots.valid & ~window, budget - self.recent)
