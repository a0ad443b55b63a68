"""The slow, obvious kernel: float64, the whole matrix at once. Every fast kernel is tested against
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels.contracts import Needs, Observed


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    needs: Needs,
    valid: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Observed]:
    """Attention of the step's q queries over n slots, in float64.

    query `[b, H, q, d]`; keys `[b, K, n, d]`; values `[b, K, n, e]`; the q new tokens are the last
    q slots and see each other causally. valid: bool `[b, K, n]`, False for empty slots (None: all
    hold a token). real: bool `[b, q]`, False for padded queries (None: none are). A query that sees
    no slot gets zeros. Returns the output `[b, H, q, e]` in the query's dtype and what `needs` asks
    for.
    """
    batch, heads, q, _ = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    wide_keys = keys.double().repeat_interleave(group, dim=1)
    wide_values = values.double().repeat_interleave(group, dim=1)
    logits = query.double() @ wide_keys.transpose(-1, -2) * scale
    slot = torch.arange(n, device=query.device)
    row = torch.arange(q, device=query.device)
    visible = (slot[None, :] <= row[:, None] + (n - q)).expand(batch, heads, q, n)
    if valid is not None:
        visible = visible & valid.repeat_interleave(group, dim=1)[:, :, None, :]
    if real is not None:
        visible = visible & real[:, None, :, None]
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    power = {"sum": weights, "square": weights.square(), None: None}[needs.columns]
    if power is not None:
        age = torch.arange(q - 1, -1, -1, device=query.device, dtype=torch.float64)
        power = (power * (needs.decay**age)[:, None]).sum(2).float()
        power = power.view(batch, kv_heads, group, n).sum(2) if needs.fold else power
    rows = min(needs.last_rows, q)
    observed = Observed(
        fresh=q,
        columns=power,
        rows=weights[:, :, q - rows :].float() if rows else None,
        keys=keys if needs.keys else None,
        values=values if needs.values else None,
        queries=query if needs.queries else None,
        scale=scale,
    )
    return (weights @ wide_values).to(query.dtype), observed
