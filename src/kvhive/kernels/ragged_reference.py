"""The slow, obvious kernels for ragged rows: float64, one row after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvhive.kernels.contracts import Needs
from kvhive.kernels.ragged import Extents, Seen

NEVER = float("-inf")


def attend(
    query: Tensor, keys: Tensor, values: Tensor, extents: Extents, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row's q queries to its slots, of which the last q are their own tokens,
    which see each other causally.

    query `[b, H, q, d]`, of which head h reads KV head `h // (H // K)`; keys `[S, d]`; values
    `[S, e]`; scale multiplies the product of a query and a key. Returns the output `[b, H, q, e]`
    in the query's dtype, zeros where a query sees nothing, and the natural logarithm of the sum of
    exp(logit), float64 `[b, H, q]`, minus infinity there.
    """
    out = query.new_zeros(*query.shape[:3], values.shape[1])
    lse = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
    for row, slots, logits in _logits(query, keys, extents, scale):
        seen = logits.softmax(-1).nan_to_num(0.0) @ values[slots].double()
        _of_rows(out, extents)[row] = seen.to(out.dtype)
        _of_rows(lse, extents)[row] = logits.logsumexp(-1)
    return out, lse


def report(
    query: Tensor, keys: Tensor, extents: Extents, lse: Tensor, scale: float, needs: Needs
) -> Seen:
    """What the queries gave each slot, `lse` being that of `attend`."""
    group, q = query.shape[0] * query.shape[1] // len(extents.starts), query.shape[2]
    last = min(needs.last_rows, q)
    columns = keys.new_zeros(group, len(keys), dtype=torch.float64)
    rows = keys.new_zeros(group, last, len(keys), dtype=torch.float64)
    weight = needs.decay ** torch.arange(q - 1, -1, -1, dtype=torch.float64, device=keys.device)
    for row, slots, logits in _logits(query, keys, extents, scale):
        seen = logits - _of_rows(lse, extents)[row].double()[..., None]
        weights = seen.exp().nan_to_num(0.0)
        power = weights.square() if needs.columns == "square" else weights
        columns[:, slots] = (power * weight[:, None]).sum(1)
        rows[:, :, slots] = weights[:, q - last :]
    return Seen(
        columns=(columns.sum(0) if needs.fold else columns).float() if needs.columns else None,
        rows=rows.float() if last else None,
    )


def _of_rows(tensor: Tensor, extents: Extents) -> Tensor:
    """`[b, H, ...]` as `[R, group, ...]`; without a copy where there are no gaps."""
    return tensor.reshape(len(extents.starts), -1, *tensor.shape[2:])


def _logits(
    query: Tensor, keys: Tensor, extents: Extents, scale: float
) -> Iterator[tuple[int, slice, Tensor]]:
    """Each row, its slots, and its logits, float64 `[group, q, length]`, minus infinity where a
    query does not see a slot.
    """
    q = query.shape[2]
    places = zip(extents.starts.tolist(), extents.lengths.tolist(), strict=True)
    for row, (start, length) in enumerate(places):
        slots = slice(start, start + length)
        logits = _of_rows(query, extents)[row].double() @ keys[slots].double().T * scale
        slot = torch.arange(length, device=keys.device)
        own = torch.arange(length - q, length, device=keys.device)
        visible = slot <= own[:, None]
        if extents.valid is not None:
            visible = visible & extents.valid[slots]
        yield row, slots, logits.masked_fill(~visible, NEVER)
