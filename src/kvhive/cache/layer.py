"""HiveLayer: one layer of the cache. Append, attend, observe, evict, in that order, every step."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvhive.cache.budgeted import BudgetedLayer
from kvhive.cache.positions import by_row, gaps_closed
from kvhive.cache.speculation import Recording
from kvhive.kernels import NOTHING, Needs, Observed, attend, span

HANDLE = "_kvhive_layer"  # attribute of the returned key tensor by which attention finds its layer


class _Waiting(threading.local):
    """Whether this thread's last update still waits for its attention call."""

    def __init__(self) -> None:
        self.flag = False

    def pop(self) -> bool:
        """The flag; lowers it."""
        flag, self.flag = self.flag, False
        return flag


WAITING = _Waiting()


class HiveLayer(BudgetedLayer):
    """One attention layer's cache, step by step; what it is made of is in `BudgetedLayer`.

    record_past: whether votes and evictions wait for `crop`, as speculative decoding needs it.
    """

    record_past: bool = False
    _recorded: Recording

    # ---- the step -------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys `[b, K, q, d]` and values `[b, K, q, e]`; return all that is held.

        The key tensor returned is a fresh view that carries this layer, so that the attention
        function finds it. Raises `ValueError` if the cache was made for another model or batch, or
        if the last tokens appended were never attended.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen:
            self._check_same_shape(key_states)
        if self.store.length != self.slots.length:
            raise ValueError(
                "attention did not read the last tokens of this cache: either its model uses "
                "another attention than 'kvhive' (HiveCache.for_model sets it) or the last step "
                "failed halfway (make a new cache, or call reset())"
            )
        fresh = key_states.shape[2]
        self.store.append(key_states.detach(), value_states.detach(), self._room(fresh))
        self.seen += fresh
        keys = self.store.keys
        keys = keys.view(keys.shape)
        setattr(keys, HANDLE, self)
        WAITING.flag = True
        return keys, self.store.values

    @torch.no_grad()
    def attend(self, query: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
        """Attention of the tokens just appended, `[b, H, q, d]` -> `[b, H, q, e]`, and then the
        eviction.

        real: bool `[b, q]`, False for padding among the new tokens; None when there is none.
        """
        fresh, order = query.shape[2], None
        if real is not None and bool((real[:, :-1] & ~real[:, 1:]).any()):
            order = real.to(torch.uint8).sort(dim=1, stable=True).indices  # padding first
            query, real = by_row(query, order), real.gather(1, order)
            self._reorder_newest(order)
        self._add_slots(fresh, real)
        needs = NOTHING if self.record_past else self.policy.needs
        out, seen = self._attend(query, scale, needs, real)
        if self.record_past:
            self._recorded.add(query, scale, real)
        else:
            self._observe(seen)
            if real is not None:
                self._close_gaps()
            self._evict(decoding=fresh == 1)
        return out if order is None else by_row(out, order.argsort(1))

    def _reorder_newest(self, order: Tensor) -> None:
        """Put the tokens just appended, not yet in the slots, in the order of int64 `[b, q]`."""
        held = torch.arange(self.slots.length, device=self.device).expand(order.shape[0], -1)
        index = torch.cat([held, order + self.slots.length], 1)
        index = index[:, None].expand(-1, self.store.keys.shape[1], -1)
        self.store.compact(index, self.store.capacity)

    def _attend(
        self, query: Tensor, scale: float, needs: Needs, real: Tensor | None
    ) -> tuple[Tensor, Observed]:
        slots = self.slots
        width = span(slots.length, self.store.capacity)
        valid = slots.valid if slots.holes else None
        keys, values = self._read_keys(width), self.store.read(width)[1]
        return attend(query, keys, values, scale, needs, valid, real, slots.length)

    @torch.no_grad()
    def replay(self, key_states: Tensor, value_states: Tensor, seen: Observed) -> None:
        """A step without padding whose attention was computed elsewhere: append, observe, evict.

        Shapes as in `update`. seen: what `attend` would have reported for this policy's `needs`,
        keys and values included where it wants them. Several layers can so learn from one pass of
        the model.
        """
        self.update(key_states, value_states)
        WAITING.pop()
        self._add_slots(key_states.shape[2], None)
        self._observe(seen)
        self._evict(decoding=key_states.shape[2] == 1)

    def _observe(self, seen: Observed) -> None:
        if seen.queries is not None:
            seen = replace(seen, rotation=self.written)
        self._scale = seen.scale
        self.policy.observe(self.slots, seen)

    def _add_slots(self, fresh: int, real: Tensor | None) -> None:
        start = self.seen - fresh
        if real is not None and self._row_seen is None:
            batch = real.shape[0]
            self._row_seen = torch.full((batch,), start, dtype=torch.int64, device=real.device)
        if self._row_seen is None:
            self.slots.append(start, fresh, self.store.capacity)
        else:
            if real is None:
                real = torch.ones(len(self._row_seen), fresh, dtype=torch.bool, device=self.device)
            position = self._row_seen[:, None] + real.cumsum(1) - 1
            self._row_seen = self._row_seen + real.sum(1)
            self.slots.append(position.masked_fill(~real, -1), fresh, self.store.capacity)
        self._appended += fresh
        if not self.record_past:
            self._set_limits(fresh)

    def _close_gaps(self) -> None:
        index = gaps_closed(self.slots)
        if index is not None:
            self.store.compact(index, self.slots.length)
            self.slots.compact(index, self.slots.length, holes=True)
            self.placement.update(self.slots, self.row_seen())

    # ---- what transformers asks of a cache layer -------------------------------------------------

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take the newest tokens back without a trace."""
        return self.record_past or not (self.evicted or self.policy.needs.votes)

    def activate_past_recording(self) -> None:
        """Postpone votes and evictions until `crop`, as speculative decoding needs it."""
        self.record_past = True

    def end_recording(self) -> None:
        """Commit what is pending and return to ordinary steps."""
        self.crop(0)
        self.record_past = False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the newest `-tokens_to_remove` tokens; then count votes and evict as postponed.

        Older releases of transformers pass a tensor. Raises `ValueError` for a positive argument
        and for a crop behind an eviction.
        """
        remove = -int(tokens_to_remove)
        if remove < 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {-remove}")
        if not self.is_initialized or (remove == 0 and not self._recorded):
            return
        if remove > self._appended:
            raise ValueError(
                f"crop: asked to take back {remove} tokens, but only {self._appended} were added "
                "since the last eviction and what was evicted before cannot be brought back"
            )
        if remove and not self.record_past and self.policy.needs.votes:
            raise ValueError(
                "crop: these tokens have voted already; call activate_past_recording() before the "
                "steps that may be taken back"
            )
        self._truncate(remove)
        self._commit(remove)

    def _truncate(self, remove: int) -> None:
        length = self.slots.length - remove
        if self._row_seen is not None:
            real = (self.slots.position[:, 0, length:] >= 0).sum(-1)
            self._row_seen = self._row_seen - real
        self.slots.truncate(length)
        self.store.truncate(length)
        self.seen -= remove
        self._appended -= remove

    def _commit(self, removed: int) -> None:
        """Count the votes of the recorded queries that were not taken back, and evict."""
        step = self._recorded.take(removed)
        if step is None:
            return
        query, scale, real = step
        self._set_limits(query.shape[2])
        if self.policy.needs != NOTHING:
            _, seen = self._attend(query, scale, self.policy.needs, real)
            self._observe(seen)
        self._evict(decoding=query.shape[2] == 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        if self.seen:
            self._recorded.select_rows(beam_idx.to(self.device))

    def reset(self) -> None:
        """Back to empty; settings stay."""
        super().reset()
        self._recorded = Recording()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        return super().nbytes + self._recorded.nbytes

    def _check_same_shape(self, keys: Tensor) -> None:
        held = self.store.keys
        expected = (held.shape[0], held.shape[1], held.shape[3], held.dtype)
        got = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype)
        if got != expected:
            names = "(batch, KV heads, key width, dtype)"
            raise ValueError(
                f"this cache holds {names} = {expected} but was given {got}; a cache belongs to "
                "one model and one batch: make a new one, or call reset()"
            )
