"""The few ways to choose slots that many policies share. Pure functions on `[b, K, n]` tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.slots import Slots


def sinks(slots: Slots, size: int) -> Tensor:
    """bool: the first `size` tokens each head holds (padding does not count)."""
    rank = slots.rank
    return (rank >= 0) & (rank < size)


def new_tokens(slots: Slots, fresh: int) -> Tensor:
    """int64 `[b, K]`: how many of the last `fresh` slots hold a token; of a padded row fewer do."""
    return slots.valid[:, :, slots.length - fresh :].sum(-1)


def recent(slots: Slots, size: Tensor | int) -> Tensor:
    """bool: the last `size` tokens each head holds; size an int, or int `[b, K]`."""
    size = size[..., None] if isinstance(size, Tensor) else size
    rank = slots.rank
    return (rank >= 0) & (rank >= slots.count[..., None] - size)


def keep_top(
    score: Tensor, candidates: Tensor, number: Tensor, newer_first: bool = False
) -> Tensor:
    """bool: the `number` (int `[b, K]`) best-scored candidates of each head.

    Ties go to the older token, or to the newer one if `newer_first`. A stable sort and not `topk`,
    which leaves the order of ties open, so that results would differ between devices.
    """
    score = score.float().masked_fill(~candidates, float("-inf"))
    if newer_first:
        score = score.flip(-1)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    if newer_first:
        place = place.flip(-1)
    return candidates & (place < number[..., None])


def grouped(per_query_head: Tensor, kv_heads: int) -> Tensor:
    """`[b, H, ...]` -> `[b, K, H / K, ...]`: the query heads that share each KV head."""
    batch, heads, *rest = per_query_head.shape
    return per_query_head.view(batch, kv_heads, heads // kv_heads, *rest)


def lengths(vectors: Tensor) -> Tensor:
    """float32 `[b, K, n]`: Euclidean lengths of `[b, K, n, d]`, summed in float32 or better."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=wide)
    return length.float()


def layer_mean(score: Tensor, position: Tensor) -> Tensor:
    """float32 `[b, K, n]`: each token's mean score over the KV heads that hold it.

    position: int32 `[b, K, n]`, ascending. All heads hold the same tokens unless their budgets
    differ; a token is then looked up in every head by its position.
    """
    if bool((position == position[:, :1]).all()):
        return score.mean(1, keepdim=True).expand_as(score)
    heads, n = score.shape[1:]
    mine = position[:, :, None].expand(-1, -1, heads, -1).contiguous()
    theirs = position[:, None].expand(-1, heads, -1, -1).contiguous()
    place = torch.searchsorted(theirs, mine).clamp_max(n - 1)
    shared = theirs.gather(-1, place) == mine
    scores = score[:, None].expand(-1, heads, -1, -1).gather(-1, place)
    return (scores * shared).sum(2) / shared.sum(2)


def joint_ranks(value: Tensor, closeness: float) -> Tensor:
    """int64 `[b, K, n]`: ranks from 0, ascending; neighbours within a share of `closeness` are one.

    For values that would be equal but for their rounding, which may differ from batch to batch.
    """
    ordered, order = value.sort(dim=-1)
    apart = ordered[..., 1:] - ordered[..., :-1] > closeness * ordered[..., 1:].abs()
    rank = F.pad(apart.cumsum(-1), (1, 0))
    return torch.empty_like(rank).scatter_(-1, order, rank)
