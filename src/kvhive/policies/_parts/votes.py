"""Votes: one bit for every slot and each of the last `history` queries, packed into bytes.

The query at position p of a row owns bit `p % bits` of every slot of that row, `bits` being those
of whole bytes, `history` or a few more. So there is no pointer to keep, padding takes no part, and
a query overwrites one that is older than all that count. A ring is a column of dtype uint8 and
trailing shape `[bytes]`; slots dropped take their bits with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kvhive.kernels import Rows
from kvhive.slots import Slots

Threshold = Literal["seen", "cache"]


def ring_bytes(history: int) -> int:
    """Bytes a slot needs to remember `history` queries."""
    return -(-history // 8)


def blocks(
    slots: Slots, rows: Rows, threshold: Threshold
) -> Iterator[tuple[Tensor, Tensor | int, Tensor]]:
    """The last queries, a block at a time: their probabilities `[b, K, G, few, n]`, the positions
    of the voters and their even `shares`.
    """
    if rows.count == 1 and slots.last is not None and threshold == "seen":
        share = torch.full((1, 1, 1), 1 / (slots.last + 1), device=slots.device)
        yield by_group(rows.all(), slots.heads), slots.last, share
        return
    voters, share, start = slots.newest(rows.count), shares(slots, rows.count, threshold), 0
    for block in rows:
        stop = start + block.shape[2]
        yield by_group(block, slots.heads), voters[:, start:stop], share[:, :, start:stop]
        start = stop


def shares(slots: Slots, rows: int, threshold: Threshold) -> Tensor:
    """float32 `[b, K, rows]`: an even share of attention for each of the last `rows` queries.

    1 / tokens the query has seen, itself included, or ("cache") 1 / keys it could see. That of a
    padded query means nothing.
    """
    number = slots.position if threshold == "seen" else slots.rank
    return 1 / (number[..., -rows:] + 1).clamp_min(1).float()


def hide_unseen(found: Tensor, slots: Slots, voters: Tensor | int) -> None:
    """Clear, in place, what queries at the positions of the `voters` could not see: `[b, K, r, n]`.

    Those are empty slots and later tokens.
    """
    if isinstance(voters, Tensor):
        found.masked_fill_(slots.position[:, :, None] > voters[:, None, :, None], 0)
    if slots.holes:
        found.masked_fill_(~slots.valid[:, :, None], 0)


def by_group(rows: Tensor, heads: int) -> Tensor:
    """`[b, H, r, n]` -> `[b, K, G, r, n]`: the query heads that share each of `heads` KV heads."""
    return rows.reshape(rows.shape[0], heads, -1, *rows.shape[2:])


def record(ring: Tensor, votes: Tensor, position: Tensor | int) -> None:
    """Write the votes of some queries, one after the other, into a ring, in place.

    ring: uint8 `[b, K, n, bytes]`. votes: bool or uint8 `[b, K, r, n]`, ones and zeros, r at most
    what the ring remembers. position: of the voters, int64 `[b, r]` (-1: padding, which comes first
    and does not vote), or the position of a single query where all rows agree on it.
    """
    if isinstance(position, int):
        _record_same(ring, votes[:, :, 0], position % (8 * ring.shape[-1]))
    elif votes.shape[2] == 1:
        _record_one(ring, votes[:, :, 0], position)
    else:
        _record_all(ring, votes, position)


def _record_same(ring: Tensor, votes: Tensor, bit: int) -> None:
    """One query, the same bit in all rows: only the byte that holds it is touched."""
    mask = 1 << bit % 8
    ring[..., bit // 8].bitwise_and_(0xFF ^ mask).bitwise_or_(votes.view(torch.uint8) * mask)


def _record_one(ring: Tensor, votes: Tensor, position: Tensor) -> None:
    """One query a row: only the byte that holds its bit is touched; for padding not even that."""
    bit = (position % (8 * ring.shape[-1]))[:, :, None, None]
    index = (bit // 8).expand(*votes.shape, 1)
    mask = ((position >= 0)[:, :, None, None] << (bit % 8)).to(torch.uint8)
    fresh = (ring.gather(-1, index) & ~mask) | (votes[..., None] * mask)
    ring.scatter_(-1, index, fresh)


def _record_all(ring: Tensor, votes: Tensor, position: Tensor) -> None:
    """Several queries a row: the bytes that hold their bits are put together, and put in place."""
    (batch, heads, count, n), size = votes.shape, ring.shape[-1]
    width = ring_bytes(count + 7)  # bytes that neighbouring bits may touch
    if width < size:
        start = torch.div(position.amax(1) - (count - 1), 8, rounding_mode="floor")
    else:
        width, start = size, position.new_zeros(batch)
        position = torch.where(position >= 0, position % (8 * size), position)
    bit = torch.where(position >= 0, position - 8 * start[:, None], 8 * width)  # the last: no bit
    wide = votes.new_zeros(batch, heads, 8 * width + 1, n)
    wide.scatter_(2, bit[:, None, :, None].expand_as(votes), votes)
    written = torch.zeros_like(wide[:, 0, :, 0], dtype=torch.bool).scatter_(1, bit, True)
    fresh = _pack(wide[:, :, :-1]).transpose(-1, -2)
    stale = _pack(written[:, :-1, None])[:, None, None, :, 0]
    place = (start[:, None] + torch.arange(width, device=ring.device)) % size
    place = place[:, None, None].expand_as(fresh)
    ring.scatter_(-1, place, (ring.gather(-1, place) & ~stale) | fresh)


def count(ring: Tensor, newest: Tensor, rows: Tensor) -> Tensor:
    """int64 `[b, K, n]`: how many of the last `rows` queries voted for each slot.

    ring: uint8 `[b, K, n, bytes]`. newest: int `[b, K]`, position of the row's last query. rows:
    int `[b, K]`, at most what the ring remembers.
    """
    bits = 8 * ring.shape[-1]
    age = (newest[..., None] - torch.arange(bits, device=ring.device)) % bits
    return _ones(ring & _pack((age < rows[..., None])[..., None])[:, :, None, :, 0]).sum(-1)


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
