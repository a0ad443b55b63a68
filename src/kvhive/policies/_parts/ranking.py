"""Ranking: scores of tokens of all heads, and all layers, made comparable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shares_below(scores: Sequence[Tensor], among: Sequence[Tensor]) -> list[Tensor]:
    """float32 `[b, K, n]` each: the share of a row's tokens, in all of `scores`, that score lower.

    scores: float32 `[b, K, n]` of each layer, n its own. among: bool, the tokens to count, by which
    all are judged. Equal scores rank alike, and rows are judged independently.
    """
    flat = torch.cat([score.float().flatten(1) for score in scores], 1)
    counted = torch.cat([one.flatten(1) for one in among], 1)
    ordered = flat.masked_fill(~counted, float("inf")).sort(-1).values
    below = torch.searchsorted(ordered, flat.contiguous())
    share = below / counted.sum(-1, keepdim=True).clamp_min(1)
    parts = share.float().split([score[0].numel() for score in scores], 1)
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]
