"""The slow, obvious kernels: float64, the whole matrix at once. Every fast one is tested against
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvhive.kernels.contracts import Ask, Observed, Rows

NEVER = float("-inf")


def attend(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
    """Attention of the step's q queries over n slots, in float64.

    query `[b, H, q, d]`; keys `[b, K, n, d]`; values `[b, K, n, e]`; the q new tokens are the last
    q slots. A query that sees no slot gets zeros. Returns the output `[b, H, q, e]` in the query's
    dtype and what `ask.needs` wants to know.
    """
    logits = _logits(query, keys, ask)
    weights = logits.softmax(-1).nan_to_num(0.0)
    out = weights @ _wide(values, query.shape[1])
    seen = _observed(query, keys, weights, ask)
    lse = logits.logsumexp(-1) if ask.lse else None
    return out.to(query.dtype), replace(seen, lse=lse)


def segment(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> tuple[Tensor, Tensor]:
    """As `attend`, for slots that are only a part of what is held: the output `[b, H, q, e]`
    normalised within them and the natural log of the sum of exp(logit), `[b, H, q]`; both float64.
    """
    logits = _logits(query, keys, ask)
    out = logits.softmax(-1).nan_to_num(0.0) @ _wide(values, query.shape[1])
    return out, logits.logsumexp(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp over all segments, from those of each."""
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    weight = [(lse - total).exp().nan_to_num(0.0)[..., None] for _, lse in parts]
    return sum(w * out for w, (out, _) in zip(weight, parts, strict=True)), total  # type: ignore[return-value]


def report(query: Tensor, keys: Tensor, lse: Tensor, ask: Ask) -> Observed:
    """What the queries gave the slots of one segment, `lse` `[b, H, q]` being that of all."""
    weights = (_logits(query, keys, ask) - lse[..., None].double()).exp().nan_to_num(0.0)
    return _observed(query, keys, weights, ask)


def peaks(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """The largest probability that any query gives each slot, float32 `[b, K, n]`."""
    weights = _logits(query, keys, ask).softmax(-1).nan_to_num(0.0)
    most: Tensor = weights.unflatten(1, (keys.shape[1], -1)).amax((2, 3)).float()
    return most


def _wide(tensor: Tensor, heads: int) -> Tensor:
    return tensor.double().repeat_interleave(heads // tensor.shape[1], dim=1)


def _logits(query: Tensor, keys: Tensor, ask: Ask) -> Tensor:
    """float64 `[b, H, q, n]`, minus infinity where a query does not see a slot."""
    batch, heads, q, _ = query.shape
    n = keys.shape[2]
    logits = (query.double() * ask.scale) @ _wide(keys, heads).transpose(-1, -2)
    slot = torch.arange(n, device=query.device)
    row = torch.arange(q, device=query.device)
    visible = (slot[None, :] <= row[:, None] + (n - q)).expand(batch, heads, q, n)
    if not ask.causal:
        visible = torch.ones_like(visible)
    if ask.valid is not None:
        visible = visible & ask.valid.repeat_interleave(heads // keys.shape[1], dim=1)[:, :, None]
    if ask.step.real is not None:
        visible = visible & ask.step.real[:, None, :, None]
    return logits.masked_fill(~visible, NEVER)


def _observed(query: Tensor, keys: Tensor, weights: Tensor, ask: Ask) -> Observed:
    needs, q = ask.needs, query.shape[2]
    power = {"sum": weights, "square": weights.square(), None: None}[needs.columns]
    if power is not None:
        age = torch.arange(q - 1, -1, -1, device=query.device, dtype=torch.float64)
        power = (power * (needs.decay**age)[:, None]).sum(2).float()
        if needs.fold:
            power = power.unflatten(1, (keys.shape[1], -1)).sum(2)
    rows = min(needs.last_rows, q)
    return Observed(
        fresh=q,
        columns=power,
        rows=Rows.of(weights[:, :, q - rows :].float()) if rows else None,
        queries=query if needs.queries else None,
        keys=keys if needs.keys else None,
        scale=ask.scale,
    )
