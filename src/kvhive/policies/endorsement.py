"""Endorsement: the percentile votes of the code released with Scissorhands, without its loops.

A query endorses the keys that it gives more than a threshold, and a key is visible to the query at
position i if it is among the `recent` before i or a query in [i - history, i) endorsed it. What a
query endorses depends on what it could see, and so on all queries before it: a recurrence over the
prompt. It is solved for blocks of queries at once by iterating from a guess until nothing changes;
as no query depends on later ones, the result is the one that a loop would find.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.slots import Slots

BLOCK = 64  # queries solved together


@dataclass(frozen=True)
class Rule:
    """Who is visible: queries remembered, recent keys, first pruned position, share endorsed."""

    history: int
    recent: int
    start: int
    keep_fraction: float

    def visible(self, key: Tensor, query: Tensor, endorsed: Tensor) -> Tensor:
        """bool: whether keys at positions `key` are visible to queries at positions `query`.

        endorsed: 1 + position of the last query before it that endorsed the key, 0 for none. The
        three are ints that broadcast. A key that is not visible once never is again.
        """
        voted = (endorsed > 0) & (endorsed > query - self.history)
        return (query < self.start) | (key >= query - self.recent) | voted

    def rank(self, length: Tensor) -> Tensor:
        """int64: place, in an ascending row of `length` probabilities, of the one to exceed."""
        return ((1 - self.keep_fraction) * length + 1e-9).floor().long()


def endorse(
    rule: Rule, slots: Slots, endorsed: Tensor, query: Tensor, keys: Tensor, scale: float
) -> Tensor:
    """Let the step's queries endorse, and say what each could see: bool `[b, K, q, n]`.

    endorsed: int32 `[b, K, n]`, updated in place; see `Rule.visible`. query `[b, H, q, d]`, keys
    `[b, K, n, d]`. Padded queries see nothing.
    """
    blocks = []
    for start in range(0, query.shape[2], BLOCK):
        stop = min(start + BLOCK, query.shape[2])
        position, causal = _block(slots, query.shape[2], start, stop)
        weights = _weights(query[:, :, start:stop], keys, scale, causal)
        seen = _solve(rule, slots, endorsed, weights, position, causal)
        blocks.append(seen)
    return torch.cat(blocks, 2)


def _block(slots: Slots, fresh: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Positions int32 `[b, 1, r]` of the step's queries start..stop-1; the keys they could see."""
    first = slots.length - fresh
    position = slots.position[:, :1, first + start : first + stop]
    slot = torch.arange(slots.length, device=position.device)
    causal = (slot <= slot[first + start : first + stop, None]) & slots.valid[:, :, None, :]
    return position, causal & (position >= 0)[..., None]


def _weights(query: Tensor, keys: Tensor, scale: float, causal: Tensor) -> Tensor:
    """Probabilities with nothing pruned, float32 `[b, K, G, r, n]`; zeros for padded queries."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    logits = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * scale
    return logits.masked_fill(~causal[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)


def _solve(
    rule: Rule,
    slots: Slots,
    endorsed: Tensor,
    weights: Tensor,
    position: Tensor,
    causal: Tensor,
) -> Tensor:
    """The fixed point for one block: bool `[b, K, r, n]`, what each query sees; updates `endorsed`."""
    threshold = _threshold(rule, slots, weights)
    total = weights.sum(-1, keepdim=True)
    time = position[..., None]
    votes = (weights > threshold).any(2)
    while True:
        last = torch.where(votes, time + 1, 0).cummax(2).values
        before = torch.cat([endorsed[:, :, None], torch.maximum(last, endorsed[:, :, None])], 2)
        own = slots.position[:, :, None, :]
        seen = causal & rule.visible(own, time, before[:, :, :-1])
        # Pruning raises what is left by one over its share; compared this way, a row of which nothing
        # was pruned gives exactly the votes it gave unpruned.
        share = (weights * seen[:, :, None]).sum(-1, keepdim=True) / total.clamp_min(1e-30)
        settled = ((weights > threshold * share) & seen[:, :, None]).any(2)
        if torch.equal(settled, votes):
            endorsed.copy_(before[:, :, -1])
            return seen
        votes = settled


def _threshold(rule: Rule, slots: Slots, weights: Tensor) -> Tensor:
    """float32 `[b, K, G, r, 1]`: the probability to exceed; zeros of keys to come count in its rank."""
    empty = slots.length - slots.count
    place = (rule.rank(slots.count) + empty).clamp_max(slots.length - 1)
    if bool((place == place[:1, :1]).all()):
        return weights.kthvalue(int(place[0, 0]) + 1, -1, keepdim=True).values
    place = place[:, :, None, None, None].expand(*weights.shape[:-1], 1)
    return weights.sort(-1).values.gather(-1, place)
