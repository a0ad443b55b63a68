"""Merging: slots about to be dropped are averaged into slots that stay."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(tensor: Tensor, into: Tensor) -> Tensor:
    """A copy of `[b, K, n, d]` in which every target is the plain mean of itself and what joins it.

    into: int64 `[b, K, n]`, for each slot the slot of the same head that it joins, -1 for none.
    Sums are float32. Slots that nothing joins are copied bit by bit.
    """
    batch, heads, n, width = tensor.shape
    head = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1)
    joining = (into >= 0).flatten().nonzero().squeeze(1)
    targets, group = torch.unique((into + head * n).flatten()[joining], return_inverse=True)
    rows = tensor.clone(memory_format=torch.contiguous_format).view(-1, width)
    total = rows[targets].float().index_add_(0, group, rows[joining].float())
    size = 1 + group.bincount(minlength=len(targets))
    rows[targets] = (total / size[:, None]).to(tensor.dtype)
    return rows.view(batch, heads, n, width)
