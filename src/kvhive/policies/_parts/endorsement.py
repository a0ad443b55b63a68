"""Endorsement: the percentile votes of the code released with Scissorhands.

A query endorses the keys that it gives more than a threshold, and a key is visible to the query at
position i if it is among the `recent` before i or a query in [i - history, i) endorsed it. What a
query endorses depends on what it could see, and so on all queries before it: a recurrence over the
prompt that has to be walked query by query. The position of a key's last endorsement says all that
later queries need to know, so that a query costs O(n), however long the history.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.policies._parts.votes import by_group
from kvhive.slots import Slots

BLOCK = 64  # queries whose probabilities are worked out together


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

    def rank_of(self, length: int) -> int:
        """The same for one length."""
        return math.floor((1 - self.keep_fraction) * length + 1e-9)


def endorse(
    rule: Rule, slots: Slots, endorsed: Tensor, query: Tensor, keys: Tensor, scale: float
) -> Iterator[Tensor]:
    """Let the step's queries endorse, and yield for each what it sees: bool `[b, K, n]`.

    endorsed: int32 `[b, K, n]`, updated in place; see `Rule.visible`. query `[b, H, q, d]`, keys
    `[b, K, n, d]`. Padded queries see nothing.
    """
    fresh = query.shape[2]
    position = slots.position
    for start in range(0, fresh, BLOCK):
        stop = min(start + BLOCK, fresh)
        length = slots.length - fresh + stop  # slots that the block's last query may see
        causal = _causal(position[..., :length], stop - start)
        weights = _weights(query[:, :, start:stop], keys[:, :, :length], scale, causal)
        threshold = _threshold(rule, slots, weights)
        total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
        own, last = position[..., :length], endorsed[..., :length]
        for row in range(stop - start):
            time = position[:, :1, length - (stop - start) + row, None]
            seen = causal[:, :, row] & rule.visible(own, time, last)
            given, least = weights[:, :, :, row], threshold[:, :, :, row]
            # Pruning raises what is left by one over its share. Compared this way, a row of which
            # nothing was pruned gives exactly the votes it gave unpruned.
            share = (given * seen[:, :, None]).sum(-1, keepdim=True) / total[:, :, :, row]
            votes = ((given > least * share) & seen[:, :, None]).any(2)
            last.copy_(torch.where(votes, time + 1, last))
            yield torch.nn.functional.pad(seen, (0, slots.length - length))


def _causal(position: Tensor, rows: int) -> Tensor:
    """bool `[b, K, rows, n]`: tokens each of the last `rows` queries may see; padding sees none."""
    slot = torch.arange(position.shape[-1], device=position.device)
    valid = position >= 0
    return (slot <= slot[-rows:, None]) & valid[:, :, None, :] & valid[:, :, -rows:, None]


def _weights(query: Tensor, keys: Tensor, scale: float, causal: Tensor) -> Tensor:
    """Probabilities with nothing pruned, float32 `[b, K, G, r, n]`; zeros for padded queries."""
    grouped = by_group(query, keys.shape[1])
    logits = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * scale
    hidden = ~causal[:, :, None]
    return logits.masked_fill_(hidden, float("-inf")).softmax(-1).nan_to_num_(0.0)


def _threshold(rule: Rule, slots: Slots, weights: Tensor) -> Tensor:
    """float32 `[b, K, G, r, 1]`: what to exceed; in its rank, keys to come count as zeros."""
    to_come = slots.length - weights.shape[-1]
    if not slots.holes:
        least = min(rule.rank_of(slots.length), slots.length - 1) - to_come
        if least < 0:
            return torch.zeros_like(weights[..., :1])
        return weights.kthvalue(least + 1, -1, keepdim=True).values
    empty = slots.length - slots.count
    place = (rule.rank(slots.count) + empty).clamp_max(slots.length - 1) - to_come
    place = place[:, :, None, None, None].expand(*weights.shape[:-1], 1)
    ranked = weights.sort(-1).values.gather(-1, place.clamp_min(0))
    return ranked.masked_fill(place < 0, 0.0)
