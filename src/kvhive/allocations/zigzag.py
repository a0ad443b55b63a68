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

METHOD = "zigzag"
SHAPES = {  # what a profile holds; T values of tau, L compressed layers, H query heads
    "tau": "T",  # shares of attention to hold
    "share": "T L H",  # of the past tokens, needed to hold that
}


@ALLOCATIONS.register(METHOD)
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
    calibration: ClassVar[str | None] = METHOD

    tau: float = knob(0.9, "share of its attention that a layer is to hold", least=0.01, most=1.0)
    bound: float = knob(
        0.2, "share of the mean that every layer gets; 1 is uniform", least=0.0, most=1.0
    )
    profile: str | None = knob(None, "file of the profile; none: one that comes with kvhive")

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """See the base."""
        profile.check_tensors(SHAPES)
        held = profile.tensors["share"].shape[1]
        if held != layers:
            raise ValueError(
                f"this profile is of {held} layers, which does not fit {layers} compressed layers; "
                "make one for this model"
            )
        taus = profile.tensors["tau"].tolist()
        if self.tau not in taus:
            raise ValueError(
                f"zigzag: tau must be one of {', '.join(map(str, taus))}, which the profile was "
                f"learnt for, got {self.tau}; learn it with kvhive calibrate --for "
                f'"zigzag(tau=[{self.tau}])"'
            )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base; the same for all heads of a layer."""
        if facts.seen <= budget:
            return facts.even(budget)
        assert facts.profile is not None
        places = range(facts.layers) if facts.places is None else facts.places
        window = floor - 1  # what is always kept
        need = lmba(facts.profile, self.tau)[list(places)]
        past = past_budgets(need, budget - window, self.bound, facts.seen - window)
        return (past + window)[:, None].expand(-1, facts.kv_heads).clone()


def lmba(profile: Profile, tau: float) -> Tensor:
    """float64 `[L]`: the share of the past tokens that each layer needs, the mean of its heads."""
    place = profile.tensors["tau"].tolist().index(tau)
    return profile.tensors["share"][place].double().mean(-1)


def raw_budgets(need: Tensor, mean: int | float, bound: float) -> Tensor:
    """float64 `[layers]`: bound * mean for each, the rest in proportion to `need` `[layers]`."""
    weights = need.double() if need.any() else torch.ones(len(need), dtype=torch.float64)
    return bound * mean + (1 - bound) * mean * len(weights) * weights / weights.sum()


def past_budgets(
    need: Tensor, mean: int | float, bound: float, most: int, least: int = 1
) -> Tensor:
    """int64 `[layers]`: `raw_budgets` in whole tokens, whose sum is that of the budgets rounded.

    A layer that exceeds `most` gets that, and the others divide the surplus as they divide the
    rest; where all do, the sum is less. least: of each layer, at most `mean`.
    """
    count = len(need)
    if mean >= most:
        return torch.full((count,), most)
    raw = raw_budgets(need, mean, bound)
    if raw.min() < least or raw.max() > most:
        each = torch.full_like(raw, bound * mean)
        above = (raw - each).clamp_min(0)
        low, high = (least - each).clamp_min(0), most - each
        raw = each + level(above, float(count * mean - each.sum()), low, high)
    return largest_remainder(raw, round(count * mean))
