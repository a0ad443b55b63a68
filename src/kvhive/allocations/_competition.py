"""Heads that compete: how many tokens each may keep, by what its tokens are worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EMPTY = float("-inf")  # the score of a slot that holds no token
CERTAIN = float("inf")  # of a token that stays in any case


def best_first(scores: Tensor) -> Tensor:
    """float32 `[b, K, n]`: each head's scores in descending order."""
    return scores.sort(dim=-1, descending=True).values


def safe(ranked: Tensor, limits: Tensor, least: Tensor | int) -> Tensor:
    """int64 `[b, K]`: what a head keeps whatever others have: `least`, and its sinks and window.

    ranked: as `best_first` gives. Never more than the head's limit, or than it holds.
    """
    certain = (ranked == CERTAIN).sum(-1).clamp_min(least)
    return certain.minimum(limits).minimum((ranked > EMPTY).sum(-1))


def won(ranked: Sequence[Tensor], limits: Sequence[Tensor], sure: Sequence[Tensor]) -> list[Tensor]:
    """What each head keeps when the best tokens of all do: int64 `[b, K]` for each layer.

    A row's total is the sum of its limits, or all that it holds where that is less. ranked: float32
    `[b, K, n]` for each layer, as `best_first` gives; n may differ. limits, sure: int64 `[b, K]`;
    a head's `sure` best tokens are out of the competition. Equal scores: the lower layer's first,
    then the lower head's. Layers may lie on different devices; none is asked for a number.
    """
    home = ranked[0].device
    contested = [one.masked_fill(_first(one, kept), EMPTY) for one, kept in _pairs(ranked, sure)]
    held = _total([(one > EMPTY).sum(-1) for one in ranked], home)
    free = _total(limits, home).minimum(held) - _total(sure, home)
    every = torch.cat([one.flatten(1).to(home) for one in contested], 1)
    order = every.sort(dim=-1, descending=True).values
    last = order.gather(1, (free - 1).clamp_min(0))[..., None]  # what the last winner is worth
    above = [(one > last.to(one.device)).sum(-1) for one in contested]
    level = [(one == last.to(one.device)).sum(-1) for one in contested]
    drawn = _in_turn(level, free - _total(above, home), home)
    return [
        kept + better + equal.to(kept.device)
        for kept, better, equal in zip(sure, above, drawn, strict=True)
    ]


def _first(ranked: Tensor, number: Tensor) -> Tensor:
    """bool `[b, K, n]`: the first `number` (int `[b, K]`) of each head."""
    return torch.arange(ranked.shape[-1], device=ranked.device) < number[..., None]


def _pairs(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(one, other, strict=True))


def _total(counts: Sequence[Tensor], home: torch.device) -> Tensor:
    """int64 `[b, 1]`: the sum over all heads of all layers."""
    return torch.stack([count.sum(-1, keepdim=True).to(home) for count in counts]).sum(0)


def _in_turn(wanted: Sequence[Tensor], number: Tensor, home: torch.device) -> list[Tensor]:
    """`number` (int `[b, 1]`) handed out head by head, layer by layer, to each what it wants."""
    asked = torch.cat([want.to(home) for want in wanted], 1)
    before = asked.cumsum(1) - asked
    given = (number - before).clamp_min(0).minimum(asked)
    return list(given.split([want.shape[1] for want in wanted], 1))
