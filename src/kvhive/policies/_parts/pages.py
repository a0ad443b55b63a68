"""Pages: what goes when memory is given back a page at a time, of any head, the cheapest first.

Heads of all layers lie side by side, `[b, H, n]`. Their tokens are counted in pages of `page`
tokens that belong to one head each. A head's last page may be partly empty, so the first page it
gives up costs it the tokens of that page only, and each further one `page` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvhive.slots import EMPTY, Slots

NEVER = float("inf")


def side_by_side(slots: Sequence[Slots], column: str) -> tuple[Tensor, Tensor]:
    """Positions int32 and a column, both `[b, H, n]`, of all layers' heads, layer after layer.

    Layers with fewer slots get empty ones in front, which `apart` takes off again.
    """
    device, most = slots[0].position.device, max(held.length for held in slots)
    positions = [_widen(held.position.to(device), most, EMPTY) for held in slots]
    values = [_widen(held[column].to(device), most, 0) for held in slots]
    return torch.cat(positions, 1), torch.cat(values, 1)


def apart(joined: Tensor, slots: Sequence[Slots]) -> list[Tensor]:
    """`[b, H, n]` cut into what belongs to each layer, `[b, K, n of that layer]`."""
    parts = torch.split(joined, [held.heads for held in slots], dim=1)
    most = joined.shape[-1]
    return [part[..., most - held.length :] for part, held in zip(parts, slots, strict=True)]


def count_pages(tokens: Tensor, page: int) -> Tensor:
    """Pages that so many tokens take."""
    return -(-tokens // page)


def free(score: Tensor, held: Tensor, evictable: Tensor, pages: Tensor, page: int) -> Tensor:
    """bool `[b, H, n]`: what is still held when each row has given up `pages` (int64 `[b]`).

    A page is worth the score of the last token that must go for it; the pages of least worth go.
    Pages that would cost tokens that are not `evictable` never go. Ties: the newer token goes
    first; of pages those of the first head.
    """
    ranked, place = _ascending(score.masked_fill(~evictable, NEVER))
    count = held.sum(-1, keepdim=True)
    last = (count - 1) % page + 1  # tokens of the last page
    earlier = torch.arange(-(-score.shape[-1] // page), device=score.device)
    cost = earlier * page + last
    worth = ranked.gather(-1, (cost - 1).clamp_max(score.shape[-1] - 1))
    worth = worth.masked_fill(cost > evictable.sum(-1, keepdim=True), NEVER).flatten(1)
    _, rank = _ascending(worth, newer_first=False)
    freed = ((rank < pages[:, None]) & worth.isfinite()).view(cost.shape).sum(-1, keepdim=True)
    gone = torch.where(freed > 0, (freed - 1) * page + last, 0)
    return held & (place >= gone)


def _ascending(score: Tensor, newer_first: bool = True) -> tuple[Tensor, Tensor]:
    """Sorted scores, and each entry's place among them; of equal ones the newer or older first."""
    ranked, order = (score.flip(-1) if newer_first else score).sort(dim=-1, stable=True)
    numbers = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, numbers)
    return ranked, place.flip(-1) if newer_first else place


def _widen(tensor: Tensor, slots: int, fill: int) -> Tensor:
    return F.pad(tensor, (slots - tensor.shape[-1], 0), value=fill)
