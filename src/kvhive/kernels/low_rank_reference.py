"""LESS pair by pair, whole matrices at once: what `low_rank` is tested against.

This is the form the authors train with: each query has a set of tokens that it reads exactly and
one that it reads through the learned features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels.low_rank import LEAST, FeatureMaps


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    maps: FeatureMaps,
    exact: Tensor,
    folded: Tensor,
    scale: float,
) -> Tensor:
    """The output `[b, H, q, e]`: weights are exp(logit) for the pairs in bool `exact` `[b, H, q,
    n]`, and the product of features plus `LEAST` for those in `folded`; all divided by their sum.

    query `[b, H, q, d]`; keys `[b, K, n, d]`; values `[b, K, n, e]`. scale: of the logits.
    """
    group = query.shape[1] // keys.shape[1]
    features = maps.of_keys(keys).repeat_interleave(group, 1)
    keys, values = (held.repeat_interleave(group, 1) for held in (keys, values))
    logits = (query * scale) @ keys.transpose(-1, -2)
    near = logits.masked_fill(~exact, float("-inf"))
    product = maps.of_queries(query) @ features.transpose(-1, -2)
    far = (product + LEAST).log().masked_fill(~folded, float("-inf"))
    rest = (product * folded).sum(-1) + LEAST
    total = torch.logaddexp(near.logsumexp(-1), rest.log())
    weights = torch.where(exact, near, far) - total[..., None]
    return weights.exp() @ values
