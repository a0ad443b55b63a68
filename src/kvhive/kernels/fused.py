"""torch's own fused attention, for steps of which nothing has to be reported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels.contracts import Ask

MASK_BYTES = 1 << 26  # a mask of queries x slots larger than this is not built
FEW = 640  # slots: above, CPUs without 16-bit tiles are faster with two float32 matrix products
TILES = torch.cpu._is_amx_tile_supported()


def fits(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> bool:
    """Whether torch's kernel serves this step: with little memory, and fast."""
    q, n = query.shape[2], keys.shape[2]
    if values.dtype != keys.dtype:  # autocast may leave them so
        return False
    if q == 1:
        return n <= FEW or TILES or keys.device.type != "cpu" or keys.dtype == torch.float32
    if q == n or ask.valid is not None:
        return ask.valid is None
    return q * n <= MASK_BYTES


def attend(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> Tensor:
    """The output `[b, H, q, e]` alone; shapes as `reference.attend`."""
    if query.shape[2] == 1:
        return _decode(query, keys, values, ask)
    return _prompt(query, keys, values, ask)


def _decode(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> Tensor:
    """One query a row. Where KV heads hide slots of their own, the queries that share one are the
    rows of one small prompt.
    """
    batch, heads, _, width = query.shape
    kv_heads = keys.shape[1]
    if ask.valid is None:
        grouped = heads != kv_heads
        out = F.scaled_dot_product_attention(
            query, keys, values, scale=ask.scale, enable_gqa=grouped
        )
    else:
        rows = query.reshape(batch, kv_heads, heads // kv_heads, width)
        mask = ask.valid[:, :, None]
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=ask.scale)
        out = out.view(batch, heads, 1, values.shape[-1])
    return out if ask.step.real is None else out * ask.step.real[:, :, None, None]


def _prompt(query: Tensor, keys: Tensor, values: Tensor, ask: Ask) -> Tensor:
    """Several queries a row, with tokens before them or without; no slot is empty."""
    q, n = query.shape[2], keys.shape[2]
    grouped = query.shape[1] != keys.shape[1]
    if q == n:
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=ask.scale, enable_gqa=grouped
        )
    mask = torch.ones(q, n, dtype=torch.bool, device=query.device).tril_(n - q)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=ask.scale, enable_gqa=grouped
    )
