"""Shares by weight: between a least and a most, in whole tokens, with an exact total."""

from __future__ import annotations

import torch
from torch import Tensor


def apportion(
    weights: Tensor, total: int, least: Tensor | int = 0, most: Tensor | int | None = None
) -> Tensor:
    """int64, shaped as `weights`: shares in proportion to them, with sum exactly `total`.

    weights: of any shape, not negative; all zero means all alike. least, most: whole numbers, one
    or one for each share. Where a share would leave its range it takes the end of it, and the
    others divide the rest. Raises `ValueError` for a total that no such shares add up to.
    """
    weights = weights.double()
    low = torch.as_tensor(least).expand_as(weights).double()
    high = torch.as_tensor(total if most is None else most).expand_as(weights).double()
    high = high.maximum(low)
    bounds = int(low.sum()), int(high.sum())
    if not bounds[0] <= total <= bounds[1]:
        raise ValueError(
            f"allocation: {total} tokens cannot be shared out; all heads together take between "
            f"{bounds[0]} and {bounds[1]}"
        )
    return largest_remainder(level(weights, float(total), low, high), total)


def largest_remainder(real: Tensor, total: int) -> Tensor:
    """int64, shaped as `real` (float64, sum `total` but for rounding): whole parts with exactly
    that sum. The parts that lose most by rounding down are rounded up; of equals, the first.
    """
    flat = real.flatten()
    nearest = flat.round()
    flat = torch.where((flat - nearest).abs() < 1e-9 * flat.abs().clamp_min(1), nearest, flat)
    whole = flat.floor()
    order = (flat - whole).sort(descending=True, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return whole.long().view_as(real)


def level(weights: Tensor, total: float, low: Tensor, high: Tensor) -> Tensor:
    """float64: clamp(level * weights, low, high), at the level where the sum is `total`.

    All float64, of one shape; `total` between the sums of low and high.
    """
    largest = weights.max()
    scale = weights / largest if largest > 0 else torch.ones_like(weights)
    scale = scale.clamp_min(1e-12)  # what weighs nothing takes what the others cannot
    turns = torch.cat([(low / scale).flatten(), (high / scale).flatten()]).sort().values
    below, above = 0, len(turns) - 1  # between two levels at which a share meets an end of its own
    while above - below > 1:
        middle = (below + above) // 2
        if (turns[middle] * scale).clamp(low, high).sum() <= total:
            below = middle
        else:
            above = middle
    first, last = ((turns[i] * scale).clamp(low, high) for i in (below, above))
    span = float((last - first).sum())
    part = (total - float(first.sum())) / span if span > 0 else 0.0
    return first + part * (last - first)
