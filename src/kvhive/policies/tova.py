"""TOVA: drop what the newest query attends to least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.kernels import TOGETHER, Held, Needs, Observed
from kvhive.policies._parts.selection import grouped, layer_mean, recent
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Column, Slots
from kvhive.spec import knob

LAST_ROW = Needs(last_rows=1, together=TOGETHER)


@POLICIES.register("tova")
@dataclass(frozen=True)
class Tova(Policy):
    """Keep the tokens that the newest query attends to most, averaged over all heads of the layer.

    No sinks, no window, no memory of earlier queries; all KV heads of a layer hold the same tokens.
    The newest token itself may go. Ties: the newer token stays.

    Source: Oren et al. 2024, arXiv:2401.06104; `TOVACache` of the authors' code, `TOVAPress` of
    kvpress with `protect_last`. State: float32 per slot, the attention of the last query.
    """

    source: ClassVar[str] = "arXiv:2401.06104"
    cost: ClassVar[str] = "attention of the last query; 4 bytes a slot"
    granularity: ClassVar[Literal["head", "layer", "model"]] = "layer"
    ties: ClassVar[Literal["older", "newer"]] = "newer"

    protect_last: bool = knob(False, "never drop the newest token, as kvpress does")

    @property
    def needs(self) -> Needs:
        """The last query's probabilities."""
        return LAST_ROW

    @property
    def columns(self) -> Mapping[str, Column]:
        """What the last query gave the slot, averaged over the query heads of the KV head."""
        return {"attention": Column()}

    @property
    def sizing(self) -> Sizing:
        """One token, beside the newest if that is protected."""
        return Sizing(least=1 + self.protect_last)

    def observe(self, slots: Slots, seen: Observed) -> None:
        """Only the newest query counts; a padded one does not."""
        assert seen.rows is not None
        row = seen.rows.all()[:, :, -1]
        given, column = grouped(row, slots.heads).mean(2), slots["attention"]
        if slots.holes:
            voted = row[:, :1].sum(-1, keepdim=True) > 0
            given = torch.where(voted, given, column)
        column.copy_(given)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """The last query's attention, averaged over the layer."""
        return layer_mean(slots["attention"], slots.position)

    def protected(self, slots: Slots, budget: Tensor) -> Tensor:
        """The newest token, if it is to be."""
        return recent(slots, int(self.protect_last))
