"""BaKlaVa's mathematics: how much each KV head changes what it is given, and shares by that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvhive.allocations._rounding import apportion

Group = Literal["mean", "max"]


def change(before: Tensor, after: Tensor) -> Tensor:
    """float64 `[...]`: 1 - mean over tokens of the cosine between `before` and `after`.

    Both `[..., n, d]`; 0 for what is passed on as it is, at most 2. Positive factors do not count.
    """
    cosine: Tensor = cosine_similarity(before.double(), after.double(), dim=-1)
    changed: Tensor = (1 - cosine.mean(-1)).clamp(0, 2)
    return changed


def of_kv_heads(heads: Tensor, kv_heads: int, group: Group) -> Tensor:
    """float64 `[texts, layers, K]`: the mean, or the largest, of the query heads that share a KV
    head. heads: `[texts, layers, H]`, as `change` gives.
    """
    grouped: Tensor = heads.double().unflatten(-1, (kv_heads, -1))
    return grouped.mean(-1) if group == "mean" else grouped.amax(-1)


def combined(kv: Tensor, layer: Tensor | None) -> Tensor:
    """float64 `[layers, K]`: a KV head's importance in its layer, times its layer's in the model,
    each divided by its mean; the first alone without `layer`.

    kv: `[layers, K]`; layer: `[layers]`. A layer in which nothing changes counts its heads alike.
    """
    within = _of_mean(kv.double())
    return within if layer is None else within * _of_mean(layer.double())[:, None]


def proportional(importance: Tensor, total: int, least: int, most: int | None) -> Tensor:
    """int64 `[layers, K]`: shares in proportion to importance, as `apportion` rounds them."""
    return apportion(importance, total, least, most)


def tiers(
    importance: Tensor, total: int, least: int, most: int | None, part: float, scale: float
) -> Tensor:
    """int64 `[layers, K]`: the least important heads, `part` of all rounded down, get `scale` of
    the mean, the others share the rest alike; as `apportion` rounds them. Equal importance: the
    lower layer's first, then the lower head's.
    """
    count, mean = importance.numel(), total / importance.numel()
    low = int(part * count)
    wanted = torch.full((count,), (total - low * scale * mean) / max(1, count - low)).double()
    order = importance.flatten().sort(stable=True).indices
    wanted[order[:low]] = scale * mean
    return apportion(wanted.view_as(importance), total, least, most)


def search(
    parts: Sequence[float], scales: Sequence[float], loss: Callable[[float, float], float]
) -> Tensor:
    """float64 `[parts, scales]`: the loss of every choice for `tiers`, asked for row by row.

    A part of 0 is the uniform plan whatever the scale, and is asked for once.
    """
    rows = []
    for part in parts:
        asked = scales if part else scales[:1]
        row = [loss(part, scale) for scale in asked]
        rows.append(row if part else row * len(scales))
    return torch.tensor(rows, dtype=torch.float64)


def best(losses: Tensor, parts: Sequence[float], scales: Sequence[float]) -> tuple[float, float]:
    """(part, scale) of the smallest loss; of equals, the first."""
    place = int((losses == losses.min()).flatten().nonzero()[0])
    return parts[place // len(scales)], scales[place % len(scales)]


def _of_mean(values: Tensor) -> Tensor:
    """Divided by their mean over the last dimension; 1 where all are 0."""
    mean = values.mean(-1, keepdim=True)
    return torch.where(mean > 0, values / mean, 1.0)
