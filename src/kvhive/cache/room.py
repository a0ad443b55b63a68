"""How many slots to allocate: a prompt exactly, later steps with headroom, never beyond need."""

from __future__ import annotations

from kvhive.cache.eviction import Eviction
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores import Store

HEADROOM = 128  # most slots allocated ahead while decoding: one copy of the cache for so many
LEAST = 16  # fewest; a short cache, which is quickly copied, grows by a quarter
UNEVEN_HEADROOM = 64  # most where heads differ: every one of them has it, however little it holds
UNEVEN_LEAST = 6  # fewest, a copy of a short cache in so many steps
UNEVEN_SHARE = 32  # and no more than 1 / UNEVEN_SHARE of what they hold on average


def for_step(store: Store, step: Step, eviction: Eviction, frozen: bool) -> int:
    """Slots to make room for when a step is appended. frozen: nothing is evicted after it."""
    needed = store.length + step.fresh
    if needed <= store.room:
        return store.room
    if not store.length:
        return needed
    held = store.mean + step.fresh
    uneven = eviction.sharing or held < needed
    ahead = uneven_headroom(held) if uneven else headroom(held)
    if step.phase == "prefill":
        ahead = max(step.fresh, held // 8)
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


def after_eviction(plan: Plan, growing: int, eviction: Eviction) -> int:
    """Slots to leave room for. growing: tokens that the last step brought to what was held."""
    kept = plan.longest
    uneven = eviction.sharing or plan.uneven
    ahead = uneven_headroom(plan.mean) if uneven else headroom(kept)
    bound = eviction.bound(min(growing, HEADROOM))
    return kept + ahead if bound is None else max(kept, min(kept + ahead, bound))


def headroom(held: int) -> int:
    """Slots to allocate ahead of those `held` while decoding."""
    return min(HEADROOM, max(LEAST, held // 4))


def uneven_headroom(held: int) -> int:
    """The same for heads that differ and hold so many on average."""
    return min(UNEVEN_HEADROOM, max(UNEVEN_LEAST, held // UNEVEN_SHARE))
