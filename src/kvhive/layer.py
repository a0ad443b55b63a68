"""HiveLayer: one layer of the cache. Append, attend, observe, evict, in that order, every step."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvhive.budget import Budget
from kvhive.contract import LayerContract
from kvhive.kernels import NOTHING, Needs, Observed, attend, span
from kvhive.limits import Limits, Spread
from kvhive.placing import Placement, by_row, gaps_closed
from kvhive.policies import Policy
from kvhive.recording import Recording
from kvhive.rope import Rotation
from kvhive.slots import Slots, packed_index
from kvhive.stores import StoreKind

HEADROOM = 128  # slots allocated ahead while decoding: one copy of the cache per so many tokens
UNEVEN_HEADROOM = 32  # the same where the longest head has no bound of its own
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


class HiveLayer(LayerContract):
    """Keys, values and slots of one attention layer, held to a policy's budget.

    policy: who decides. budget: how much a head may hold (None: the policy sizes itself).
    spread: (budget per head, KV heads) -> int64 `[kv_heads]`, this layer's part of the allocation.
    rotation: given when positions are counted inside the cache. slack: see `Recipe`.
    written: how the model turned the keys it wrote, where that is known.
    earlier: with a policy of scope "model", the compressed layers before this one, for which it
    evicts once it has attended; waits: whether a later layer does so for this one.
    """

    _row_seen: Tensor | None  # int64 [b], real tokens of each row, once any row was padded
    _recorded: Recording
    _appended: int  # tokens added since the last eviction: what crop can take back

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None,
        store: StoreKind,
        spread: Spread,
        rotation: Rotation | None = None,
        slack: int | None = None,
        written: Rotation | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        policy = policy.for_budget(None if budget is None else budget.tokens)
        self.policy, self.placement = policy, Placement(rotation)
        self.limits = Limits(policy, budget, spread, slack)
        self.written = written
        self.record_past = False
        self.frozen = False
        self.earlier: list[HiveLayer] = []
        self.waits = False
        self._kind = store
        self.reset()

    # ---- the step -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dtype and device from the first tensors, never from a config."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        policy = self.policy
        self.slots = Slots(batch, heads, policy.columns, policy.counters, self.device)
        self.is_initialized = True

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

    def _weigh(self) -> None:
        """Let the policy score what is held, if it scores keys or values."""
        needs = self.policy.needs
        if needs.keys or needs.values:
            held = Observed(
                fresh=0,
                keys=self._read_keys(self.slots.length) if needs.keys else None,
                values=self.store.values if needs.values else None,
                scale=self._scale,
                rotation=self.written,
            )
            self.policy.weigh(self.slots, held)

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

    def _read_keys(self, width: int) -> Tensor:
        """The first `width` keys as attention reads them."""
        return self.placement.place(self.store.read(width)[0], self.slots, self.seen)

    # ---- budget and eviction --------------------------------------------------------------------

    def _lengths(self) -> list[int]:
        return [self.seen] if self._row_seen is None else self._row_seen.tolist()

    def _set_limits(self, fresh: int) -> None:
        """A share is taken of the tokens seen whenever a step brought several of them."""
        if fresh > 1:
            self._prompted = True
        if fresh > 1 or not self._prompted or self.limits.budget is None:
            self.limits.set(self._lengths(), self.slots.heads, self.device)

    def row_seen(self) -> Tensor:
        """int64 `[b]`: real tokens each row has seen, padding excluded."""
        if self._row_seen is None:
            return torch.full((self.slots.batch,), self.seen)
        return self._row_seen.cpu()

    def _evict(self, decoding: bool) -> None:
        if self.frozen or self.limits.rows is None or not self.policy.acts(decoding):
            return
        if self.policy.scope == "model":
            self._evict_all(0, decoding)
        elif self.slots.length > self.limits.least:
            self._evict_to(self._limits(0), slack=decoding)

    def _evict_all(self, spare: int, decoding: bool) -> None:
        """The last layer evicts for all of them, leaving room for `spare` more tokens a head."""
        if self.waits:
            return
        layers = [*self.earlier, self]
        keeps = self.policy.select_all(
            [layer.slots for layer in layers],
            [layer._limits(spare) for layer in layers],
            self.limits.slack if decoding else 0,
            decoding,
        )
        if keeps is None:
            return
        for layer, keep in zip(layers, keeps, strict=True):
            keep = keep.to(layer.device)
            if not torch.equal(keep, layer.slots.valid):
                layer._compact(keep)

    def _limits(self, spare: int) -> Tensor:
        return self.limits.less(spare, self.slots.batch, self.slots.heads)

    def _evict_to(self, limits: Tensor, slack: bool) -> None:
        """Heads above their limit (int64 `[b, K]`) are cut down to it, the others left alone."""
        slots = self.slots
        over = slots.count > limits
        if not bool(over.any()):
            return
        target = self.limits.with_slack(limits) if slack else limits
        target = torch.where(over, target, limits)  # a head left alone must look so to the policy
        self._weigh()
        self._compact(torch.where(over[..., None], self.policy.select(slots, target), slots.valid))

    def _compact(self, keep: Tensor) -> None:
        """Drop all but `keep` (bool `[b, K, n]`), folded into what stays if the policy merges."""
        slots = self.slots
        into = self.policy.merge_into(slots, keep) if self.policy.merges else None
        if into is not None:
            self.store.merge(into)
        elif torch.equal(keep, slots.valid):
            return
        index, holes = packed_index(keep)
        kept = index.shape[-1]
        if self.policy.scope == "model":
            capacity = kept + UNEVEN_HEADROOM
        elif self.limits.budget is None:
            capacity = kept + HEADROOM
        else:
            capacity = max(kept, min(kept + HEADROOM, self.limits.most + 1))
        self.store.compact(index, capacity)
        slots.compact(index, capacity, holes)
        self._appended = 0
        self.evicted = True
        self.placement.update(self.slots, self.row_seen())

    def make_room(self, tokens: int) -> None:
        """Evict now, so that `tokens` more can be appended without going over budget.

        What the policy always keeps stays, so a long turn may evict again.
        """
        if not self.is_initialized or self.limits.rows is None:
            return
        if self.policy.scope == "model":
            self._evict_all(tokens, decoding=False)
        else:
            self._evict_to(self._limits(tokens), slack=False)

    def _room(self, fresh: int) -> int:
        """Slots to allocate for: a prompt exactly, a decoded token with headroom, within the
        budget.
        """
        needed = self.store.length + fresh
        if needed <= self.store.capacity:
            return self.store.capacity
        if fresh > 1:
            return needed
        if self.policy.scope == "model":
            return needed + UNEVEN_HEADROOM
        evicts = not self.frozen and self.policy.acts(decoding=True)
        bounded = evicts and self.limits.rows is not None and self.limits.budget is not None
        most = max(needed, self.limits.most + 1) if bounded else needed + HEADROOM
        return min(needed + HEADROOM, most)

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
        if not self.seen:
            return
        rows = beam_idx.to(self.device)
        self.store.select_rows(rows)
        self.slots.select_rows(rows)
        self.placement.forget()
        if self._row_seen is not None:
            self._row_seen = self._row_seen.index_select(0, rows)
        if self.limits.rows is not None and self.limits.rows.shape[0] > 1:
            self.limits.rows = self.limits.rows.index_select(0, rows)
        self._recorded.select_rows(rows)

    def reset(self) -> None:
        """Back to empty; settings stay."""
        self.is_initialized = False
        self.store = self._kind.new()
        self.slots = Slots(0, 0, {}, {}, torch.device("cpu"))
        self.seen = 0
        self.evicted = False
        self._row_seen = None
        self._appended = 0
        self._prompted = False  # whether any step brought more than one token
        self.placement = Placement(self.placement.rotation)
        self.limits.reset()
        self._scale = 1.0
        self._recorded = Recording()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        extra = [t for t in (self._row_seen, self.limits.rows) if t is not None]
        return (
            self.store.nbytes
            + self.slots.nbytes
            + self.placement.nbytes
            + self._recorded.nbytes
            + sum(tensor.untyped_storage().nbytes() for tensor in extra)
        )

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
