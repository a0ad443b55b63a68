"""The most that any query of a step gives each slot, in plain torch, chunk by chunk of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels.chunked import CHUNK, Scratch, chunk_weights
from kvhive.kernels.contracts import Ask


def peaks(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """float32 `[b, K, n]`: the largest probability that a query of the step gives each slot, over
    all its queries and the query heads that share the KV head.

    query `[b, H, q, d]`; keys `[b, K, n, d]`, of which the last q are the step's own. What no query
    sees gets 0, and padded queries count nowhere. The contract in slow motion: `reference.peaks`.
    """
    query = query.to(keys.dtype)
    (batch, _, q, _), (kv_heads, n), real = query.shape, keys.shape[1:3], ask.step.real
    top = query.new_zeros(batch, kv_heads, n, dtype=torch.float32)
    scratch = Scratch(query, keys, min(CHUNK, q))
    for start in range(0, q, CHUNK):
        stop = min(start + CHUNK, q)
        seen = n - q + stop if ask.causal else n
        weights = chunk_weights(query, keys, ask, start, stop, scratch)
        weights = weights[:, :, :, : stop - start, :seen]
        if real is not None:
            weights = weights * real[:, None, None, start:stop, None]
        most = weights.amax((2, 3)).float()
        top[..., :seen] = torch.maximum(top[..., :seen], most)
    return top
