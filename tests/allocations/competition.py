"""Heads that compete, head by head and token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def share_out(
    scores: Sequence[Tensor], limits: Sequence[Tensor], sure: Sequence[Sequence[list[int]]]
) -> list[Tensor]:
    """What each head keeps when the best tokens of all do, int64 `[b, K]` for each layer.

    sure: for each layer and row, what each head keeps whatever the others have.
    """
    shares = [torch.zeros_like(limit) for limit in limits]
    for row in range(len(limits[0])):
        total = sum(int(limit[row].sum()) for limit in limits)
        contested, kept, holds = [], 0, 0
        for layer, score in enumerate(scores):
            for head, values in enumerate(score[row].tolist()):
                held = sorted((v for v in values if v > -math.inf), reverse=True)
                mine = sure[layer][row][head]
                shares[layer][row, head] = mine
                contested += [(-value, layer, head) for value in held[mine:]]
                kept, holds = kept + mine, holds + len(held)
        for _, layer, head in sorted(contested)[: min(total, holds) - kept]:
            shares[layer][row, head] += 1
    return shares


def sure_of(scores: Tensor, limits: Tensor, least: Sequence[list[int]]) -> list[list[int]]:
    """What each head of each row keeps in any case: `least`, and what has an infinite score."""
    return [
        [
            min(
                max(least[row][head], sum(v == math.inf for v in values)),
                int(limits[row, head]),
                sum(v > -math.inf for v in values),
            )
            for head, values in enumerate(heads)
        ]
        for row, heads in enumerate(scores.tolist())
    ]


def drawn(seed: int, layers: int, rows: int, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Scores with many ties, empty slots and tokens that stay anyway, and limits for them."""
    source = torch.Generator().manual_seed(seed)
    scores, limits = [], []
    for _ in range(layers):
        slots = int(torch.randint(1, 40, (), generator=source))
        score = torch.randint(0, 6, (rows, heads, slots), generator=source).float()
        chance = torch.rand(rows, heads, slots, generator=source)
        score[chance < 0.2] = -math.inf
        score[chance > 0.9] = math.inf
        scores.append(score)
        limits.append(torch.randint(1, 20, (rows, heads), generator=source))
    return scores, limits
