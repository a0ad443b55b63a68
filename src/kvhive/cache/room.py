"""How many slots to allocate: a prompt exactly, later steps with headroom, never beyond need."""

from __future__ import annotations

from kvhive.cache.eviction import Eviction
from kvhive.step import Step
from kvhive.stores import Store

HEADROOM = 128  # most slots allocated ahead while decoding: one copy of the cache for so many
LEAST = 16  # fewest; a short cache, which is quickly copied, grows by a quarter
UNEVEN_HEADROOM = 32  # the same where the longest head has no bound of its own


def for_step(store: Store, step: Step, eviction: Eviction, frozen: bool) -> int:
    """Slots to make room for when a step is appended. frozen: nothing is evicted after it."""
    needed = store.length + step.fresh
    if needed <= store.room:
        return store.room
    if not store.length:
        return needed
    if eviction.together:
        return needed + UNEVEN_HEADROOM
    ahead = headroom(needed) if step.phase != "prefill" else max(step.fresh, needed // 8)
    bound = None if frozen else eviction.bound(min(step.fresh, HEADROOM))
    return needed + ahead if bound is None else max(needed, min(needed + ahead, bound))


def most(limit: int | None, tokens: int | None, growing: int) -> int | None:
    """The most slots that either of the two leaves room for between two steps; None: nobody knows.

    limit: what a head may hold when a step begins to evict. tokens: read at most. growing: the most
    that a step may bring to what is held already.
    """
    most = [] if limit is None else [limit + min(growing, HEADROOM)]
    if tokens is not None:
        ahead = 0 if growing == 1 else max(growing, tokens // 8)
        most.append(tokens + max(headroom(tokens), ahead))
    return min(most, default=None)


def after_eviction(kept: int, growing: int, eviction: Eviction) -> int:
    """Slots to leave room for. growing: tokens that the last step brought to what was held."""
    if eviction.together:
        return kept + UNEVEN_HEADROOM
    bound = eviction.bound(min(growing, HEADROOM))
    ahead = kept + headroom(kept)
    return ahead if bound is None else max(kept, min(ahead, bound))


def headroom(held: int) -> int:
    """Slots to allocate ahead of those `held` while decoding."""
    return min(HEADROOM, max(LEAST, held // 4))
