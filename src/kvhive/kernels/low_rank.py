"""LESS: what was evicted, folded into a state of constant size that is attended to like a segment.

Learned maps give every query and key a few features >= 0 whose product stands for exp(logit). A
state is the sum over evicted tokens of features times value, and of the features alone; what it
answers a query is merged with the exact part by its log-sum-exp (`beside`). Float32 whatever
the model's dtype. `low_rank_reference` says the same pair by pair.

Source: arXiv:2402.09398, section 3 and the authors' code (hdong920/LESS).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-6  # of a query's feature, and of the sum that a state gives: both are clamped there
SLOTS = 8192  # keys mapped at once
NEVER = float("-inf")


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The learned kernels of one layer, float32: one map a query head, one a KV head.

    H query heads, K KV heads, d the width of a key, m hidden units, R features (the rank). query_in
    `[H, d, m]`, query_out `[H, m, R]`; key_in `[K, d, m]`, key_out `[K, m, R]`; key_mix `[K, R, R]`
    with gains key_gain and mix_gain `[K, R]`. No biases. A copy shares them.
    """

    query_in: Tensor
    query_out: Tensor
    key_in: Tensor
    key_out: Tensor
    key_mix: Tensor
    key_gain: Tensor
    mix_gain: Tensor

    def __deepcopy__(self, memo: object) -> FeatureMaps:
        return self

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the weights, in their order."""
        return tuple(field.name for field in fields(cls))

    def of_queries(self, queries: Tensor, dropout: float = 0.0) -> Tensor:
        """Features `[b, H, q, R]` of queries `[b, H, q, d]` as attention has them, not scaled:
        |gelu(gelu(q W_in) W_out)|. dropout: share of the hidden units to drop, in training.
        """
        return _hidden(queries, self.query_in, self.query_out, dropout).abs()

    def of_keys(self, keys: Tensor, dropout: float = 0.0) -> Tensor:
        """Features `[b, K, n, R]` of keys `[b, K, n, d]` as they are held, already rotated:
        |u + (u W_mix) mix_gain| with u = |key_gain| gelu(gelu(k W_in) W_out).
        """
        plain = _hidden(keys, self.key_in, self.key_out, dropout)
        plain = plain * self.key_gain.abs()[:, None]
        return (plain + (plain @ self.key_mix) * self.mix_gain[:, None]).abs()


def _hidden(inputs: Tensor, into: Tensor, out: Tensor, dropout: float) -> Tensor:
    hidden = inputs.to(into.dtype) @ into
    if dropout:
        hidden = F.dropout(hidden, dropout)
    features: Tensor = F.gelu(F.gelu(hidden) @ out)
    return features


@dataclass(eq=False)
class State:
    """What was folded: values `[b, K, R, e]`, sums of features times values, and total `[b, K, R]`,
    sums of features; both float32, zero as long as nothing was folded.
    """

    values: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, rank: int, width: int, device: torch.device) -> State:
        """Of nothing; width: of a value."""
        made: dict[str, Any] = {"dtype": torch.float32, "device": device}
        values = torch.zeros(batch, heads, rank, width, **made)
        return cls(values, torch.zeros(batch, heads, rank, **made))

    def fold(self, maps: FeatureMaps, keys: Tensor, values: Tensor, dropped: Tensor) -> None:
        """Add the tokens marked in bool `[b, K, n]`; keys `[b, K, n, d]`, values `[b, K, n, e]`."""
        for start in range(0, keys.shape[2], SLOTS):
            part = slice(start, start + SLOTS)
            features = maps.of_keys(keys[:, :, part])
            more, total = summed(features, values[:, :, part], dropped[:, :, part])
            self.values += more
            self.total += total

    def answer(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As the function below."""
        return answer(features, self.values, self.total)

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        self.values = self.values.index_select(0, rows)
        self.total = self.total.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values.untyped_storage().nbytes() + self.total.untyped_storage().nbytes()


def summed(features: Tensor, values: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """What a state holds of the tokens marked in bool `[b, K, n]`: `[b, K, R, e]` and `[b, K, R]`.

    features `[b, K, n, R]`; values `[b, K, n, e]`. What was not marked may be anything.
    """
    gone = dropped[..., None]
    features = features.masked_fill(~gone, 0.0)
    held = values.to(features.dtype).masked_fill(~gone, 0.0)
    return features.transpose(-1, -2) @ held, features.sum(2)


def answer(features: Tensor, values: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """What queries of these features `[b, H, q, R]` get from a state, as from a segment: the output
    `[b, H, q, e]` and the log of what it weighs, `[b, H, q]`; where nothing was folded, nothing
    (minus infinity).
    """
    grouped = features.reshape(len(features), total.shape[1], -1, features.shape[-1])
    weight = (grouped @ total[..., None]).clamp_min(LEAST)
    out = (grouped.clamp_min(LEAST) @ values) / weight
    something = (total > 0).any(-1)[..., None]
    lse = weight[..., 0].log().masked_fill(~something, NEVER)
    return out.view(*features.shape[:3], -1), lse.view(features.shape[:3])


def beside(out: Tensor, lse: Tensor, rest: tuple[Tensor, Tensor]) -> Tensor:
    """What `segments.merge` gives of an exact part, `[b, H, q, e]` and `[b, H, q]`, and an answer,
    in few operations and for gradients; `out` in its own dtype where neither says anything.
    """
    share = torch.sigmoid(rest[1] - lse).nan_to_num(0.0)[..., None]
    return torch.lerp(out.to(share.dtype), rest[0].to(share.dtype), share).to(out.dtype)
