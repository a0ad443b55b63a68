"""Votes: one bit for every slot and each of the last `history` queries, packed into bytes.

The query at position p of a row owns bit `p % history` of every slot of that row. So there is no
pointer to keep, padding takes no part, and a query overwrites exactly the one it retires. A ring is
a column of dtype uint8 and trailing shape `[bytes]`; slots dropped take their bits with them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvhive.slots import Slots

Threshold = Literal["seen", "cache"]


def ring_bytes(history: int) -> int:
    """Bytes a slot needs to remember `history` queries."""
    return -(-history // 8)


def average_share(slots: Slots, rows: int, threshold: Threshold) -> Tensor:
    """float32 `[b, K, rows]`: an even share of attention for each of the last `rows` queries.

    1 / tokens the query has seen, itself included, or ("cache") 1 / keys it could see. That of a
    padded query means nothing. Where all share one number, `[1, 1, 1]`.
    """
    if rows == 1 and slots.last is not None and threshold == "seen":
        return torch.full((1, 1, 1), 1 / (slots.last + 1), device=slots.device)
    if threshold == "seen":
        number = slots.position[..., -rows:] + 1
    else:
        number = slots.valid.cumsum(-1)[..., -rows:]
    return 1 / number.clamp_min(1).float()


def hide_unseen(found: Tensor, slots: Slots) -> None:
    """Clear, in place, what each of the last r queries could not see: `[b, K, r, n]`.

    Those are empty slots and later tokens.
    """
    rows = found.shape[2]
    if rows == 1 and not slots.holes:
        return
    later = torch.ones(rows, rows, dtype=torch.bool, device=found.device).triu(1)
    found[..., -rows:].masked_fill_(later, 0)
    if slots.holes:
        found.masked_fill_(~slots.valid[:, :, None], 0)


def by_group(rows: Tensor, heads: int) -> Tensor:
    """`[b, H, r, n]` -> `[b, K, G, r, n]`: the query heads that share each of `heads` KV heads."""
    return rows.reshape(rows.shape[0], heads, -1, *rows.shape[2:])


def voters(slots: Slots, rows: int) -> Tensor | int:
    """Positions of the last queries, int64 `[b, rows]` (-1: padding), or the position of a single
    query where all rows agree on it.
    """
    if rows == 1 and slots.last is not None:
        return slots.last
    return slots.newest(rows)


def record(ring: Tensor, votes: Tensor, position: Tensor | int, history: int) -> None:
    """Write the votes of the last r queries into a ring, in place.

    ring: uint8 `[b, K, n, bytes]`. votes: bool or uint8 `[b, K, r, n]`, ones and zeros, r at most
    `history`. position: of the `voters`; padding does not vote.
    """
    if isinstance(position, int):
        _record_same(ring, votes[:, :, 0], position % history)
    elif votes.shape[2] == 1:
        _record_one(ring, votes[:, :, 0], position, history)
    else:
        _record_all(ring, votes, position, history)


def _record_same(ring: Tensor, votes: Tensor, bit: int) -> None:
    """One query, the same bit in all rows: only the byte that holds it is touched."""
    mask = 1 << bit % 8
    ring[..., bit // 8].bitwise_and_(0xFF ^ mask).bitwise_or_(votes.view(torch.uint8) * mask)


def _record_one(ring: Tensor, votes: Tensor, position: Tensor, history: int) -> None:
    """One query a row: only the byte that holds its bit is touched; for padding not even that."""
    bit = (position % history)[:, :, None, None]
    index = (bit // 8).expand(*votes.shape, 1)
    mask = ((position >= 0)[:, :, None, None] << (bit % 8)).to(torch.uint8)
    fresh = (ring.gather(-1, index) & ~mask) | (votes[..., None] * mask)
    ring.scatter_(-1, index, fresh)


def _record_all(ring: Tensor, votes: Tensor, position: Tensor, history: int) -> None:
    heads, bits = votes.shape[1], 8 * ring.shape[-1]
    bit = torch.where(position >= 0, position % history, bits)  # `bits`: thrown away
    wide = votes.new_zeros(*votes.shape[:2], bits + 1, votes.shape[-1])
    wide.scatter_(2, bit[:, None, :, None].expand(-1, heads, -1, votes.shape[-1]), votes)
    written = bit.new_zeros(len(bit), bits + 1, dtype=torch.bool).scatter_(1, bit, True)
    fresh = _pack(wide[:, :, :bits]).transpose(-1, -2)
    stale = _pack(written[:, :bits, None])[:, None, None, :, 0]
    ring.copy_((ring & ~stale) | fresh)


def count(ring: Tensor, newest: Tensor, rows: Tensor, history: int) -> Tensor:
    """int64 `[b, K, n]`: how many of the last `rows` queries voted for each slot.

    ring: uint8 `[b, K, n, bytes]`. newest: int `[b, K]`, position of the row's last query. rows:
    int `[b, K]`, at most `history`.
    """
    bit = torch.arange(8 * ring.shape[-1], device=ring.device)
    age = (newest[..., None] - bit) % history
    counted = (bit < history) & (age < rows[..., None])
    return _ones(ring & _pack(counted[..., None])[:, :, None, :, 0]).sum(-1)


def _pack(bits: Tensor) -> Tensor:
    """bool `[..., 8 * m, n]` -> uint8 `[..., m, n]`, the first bit the lowest."""
    byte = bits[..., ::8, :].to(torch.uint8)
    for place in range(1, 8):
        byte |= bits[..., place::8, :].to(torch.uint8) << place
    return byte


def _ones(byte: Tensor) -> Tensor:
    """uint8: the ones in each byte, counted for all bits at once."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F
