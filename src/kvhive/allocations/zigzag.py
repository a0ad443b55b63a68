"""ZigZagKV: layers that spread their attention over many tokens get more of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvhive.allocations._rounding import largest_remainder, level
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.calibration import Profile
from kvhive.spec import knob


@ALLOCATIONS.register("zigzag")
@dataclass(frozen=True)
class ZigZag(Allocation):
    """Share the budget out by how many tokens a layer needs to hold most of its attention.

    That is learnt once about a model, by `kvhive calibrate --for zigzag`. What a policy always
    keeps is left out; of the rest every layer gets the share `bound`, and the remainder in
    proportion to that need. No layer gets more than a prompt has: the others divide what is over.
    The total is exact. A prompt's own length counts, row by row.

    Source: arXiv:2412.09036, equation 6.
    """

    source: ClassVar[str] = "arXiv:2412.09036"
    profile: ClassVar[str | None] = "zigzag"

    tau: float = knob(0.9, "share of its attention that a layer is to hold", least=0.01, most=1.0)
    bound: float = knob(
        0.2, "share of the mean that every layer gets; 1 is uniform", least=0.0, most=1.0
    )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base; the same for all heads of a layer.

        Raises `ValueError` for a profile of another number of layers, or without this `tau`.
        """
        if facts.seen <= budget:
            return facts.even(budget)
        assert facts.profile is not None
        window = floor - 1  # what is always kept
        lmba = self.lmba(facts.profile, facts.layers)
        past = past_budgets(lmba, budget - window, self.bound, facts.seen - window)
        return (past + window)[:, None].expand(-1, facts.kv_heads).clone()

    def lmba(self, profile: Profile, layers: int) -> Tensor:
        """float64 `[layers]`: the share of past tokens that each layer needs, mean over its heads.

        Raises `ValueError` as `shares`.
        """
        taus, share = profile.tensors["tau"].tolist(), profile.tensors["share"]
        if self.tau not in taus:
            raise ValueError(
                f"zigzag: the profile was learnt for tau {', '.join(map(str, taus))}, got tau="
                f"{self.tau}; take one of these, or learn it: kvhive calibrate --for "
                f'"zigzag(tau=[{self.tau}])"'
            )
        if share.shape[1] != layers:
            raise ValueError(
                f"zigzag: the profile is one of {share.shape[1]} layers, but {layers} are "
                "compressed here; make one for this model, with a policy that compresses all"
            )
        return share[taus.index(self.tau)].double().mean(-1)


def raw_budgets(lmba: Tensor, mean: int | float, bound: float) -> Tensor:
    """float64 `[layers]`: bound * mean for each, and the rest in proportion to float `[layers]`."""
    weights = lmba.double() if lmba.any() else torch.ones(len(lmba), dtype=torch.float64)
    return bound * mean + (1 - bound) * mean * len(weights) * weights / weights.sum()


def past_budgets(
    lmba: Tensor, mean: int | float, bound: float, most: int, least: int = 1
) -> Tensor:
    """int64 `[layers]`: `raw_budgets` in whole tokens, whose sum is that of the budgets rounded.

    A layer that exceeds `most` gets that, and the others divide the surplus as they divide the
    rest; where all do, the sum is less. least: of each layer, at most `mean`.
    """
    count = len(lmba)
    if mean >= most:
        return torch.full((count,), most)
    raw = raw_budgets(lmba, mean, bound)
    if raw.min() < least or raw.max() > most:
        each = torch.full_like(raw, bound * mean)
        above = (raw - each).clamp_min(0)
        low, high = (least - each).clamp_min(0), most - each
        raw = each + level(above, float(count * mean - each.sum()), low, high)
    return largest_remainder(raw, round(count * mean))
