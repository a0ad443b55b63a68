"""Fading votes: what the last queries gave each slot, the older the query the less it counts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import Rows
from kvhive.policies._parts.selection import grouped, new_tokens
from kvhive.slots import Slots


def add_squares(votes: Tensor, slots: Slots, rows: Rows, last: int) -> None:
    """Add the squares of the last queries' probabilities, in place.

    votes: float32 `[b, K, n]`. rows: `[b, H, r, n]`, at most `last` of them, summed over the query
    heads that share a KV head. A query counts `1 - 1 / last` times the next one, and those of
    earlier steps count no more once a step has brought `last` queries. So queries that come
    together count as they do one by one. Those of padding leave no trace.
    """
    keep = 1 - 1 / last
    if slots.holes:
        brought = new_tokens(slots, rows.count)
        faded = (keep**brought).masked_fill(brought >= last, 0.0)[..., None]
        votes.mul_(faded)
    else:
        votes.mul_(0.0 if rows.count >= last else keep**rows.count)
    age = torch.arange(rows.count - 1, -1, -1, device=votes.device)
    weight, start = keep ** age.float(), 0
    for block in rows:
        part = weight[start : start + block.shape[2]]
        votes += (grouped(block, slots.heads).square() * part[:, None]).sum((2, 3))
        start += block.shape[2]
