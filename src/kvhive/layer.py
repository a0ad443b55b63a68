"""HiveLayer: one layer of the cache. Append, attend, observe, evict, in that order, every step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvhive.budget import Budget
from kvhive.kernels import NOTHING, Needs, Observed, attend, span
from kvhive.policies import Policy
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
Spread = Callable[[int, int], Tensor]


class HiveLayer(CacheLayerMixin):
    """Keys, values and slots of one attention layer, held to a policy's budget.

    policy: who decides. budget: how much a head may hold (None: the policy sizes itself).
    spread: (budget per head, KV heads) -> int64 `[kv_heads]`, this layer's part of the allocation.
    rotation: given when positions are counted inside the cache. slack: see `Recipe`.
    written: how the model turned the keys it wrote, where that is known.
    earlier: with a policy of scope "model", the compressed layers before this one, for which it evicts
    once it has attended; waits: whether a later layer does so for this one.
    """

    is_sliding = False
    is_compileable = False

    _row_seen: Tensor | None  # int64 [b], real tokens of each row, once any row was padded
    _limits: Tensor | None  # int64 [rows or 1, K], what each head may hold; None: no limit
    _recorded: list[tuple[Tensor, float, Tensor | None]]  # (query, scale, real) that may be taken back
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
        super().__init__()
        self.policy, self.budget, self.rotation = policy, budget, rotation
        self.written = written
        self.record_past = False
        self.frozen = False
        self.earlier: list[HiveLayer] = []
        self.waits = False
        self._kind, self._spread, self._slack = store, spread, slack
        self.reset()

    # ---- the step -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, widths, dtype and device from the first tensors, never from a config."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        policy = self.policy
        self.slots = Slots(batch, heads, policy.columns, policy.counters, self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys `[b, K, q, d]` and values `[b, K, q, e]`; return all that is held.

        The key tensor returned is a fresh view that carries this layer, so that the attention function
        finds it. Raises `ValueError` if the cache was made for another model or batch, or if the last
        tokens appended were never attended.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen:
            self._check_same_shape(key_states)
        if self.store.length != self.slots.length:
            raise ValueError(
                "attention did not read the last tokens of this cache: either its model uses another "
                "attention than 'kvhive' (HiveCache.for_model sets it) or the last step failed halfway "
                "(make a new cache, or call reset())"
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
        """Attention of the tokens just appended, `[b, H, q, d]` -> `[b, H, q, e]`, and then the eviction.

        real: bool `[b, q]`, False for padding among the new tokens; None when there is none.
        """
        fresh = query.shape[2]
        self._add_slots(fresh, real)
        needs = NOTHING if self.record_past else self.policy.needs
        out, seen = self._attend(query, scale, needs, real)
        if self.record_past:
            self._recorded.append((query, scale, real))
        else:
            self._observe(seen)
            if real is not None:
                self._close_gaps()
            self._evict(decoding=fresh == 1)
        return out

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

        Shapes as in `update`. seen: what `attend` would have reported for this policy's `needs`, keys and
        values included where it wants them. Several layers can so learn from one pass of the model.
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
        if fresh > 1:
            self._prompted = True
        if fresh > 1 or not self._prompted or self.budget is None:
            self._set_limits()

    def _close_gaps(self) -> None:
        """Move padding that came after tokens to the front of its row, where empty slots belong."""
        slots = self.slots
        valid = slots.valid
        if not bool((valid[:, :, :-1] & ~valid[:, :, 1:]).any()):
            return
        order = valid.to(torch.uint8).sort(dim=-1, stable=True).indices
        place = torch.arange(slots.length, device=self.device)
        index = order.masked_fill(place < (slots.length - slots.count)[..., None], -1)
        self.store.compact(index, slots.length)
        slots.compact(index, slots.length, holes=True)
        if self.rotation is not None:
            self._moved = self._count_moved()

    def _read_keys(self, width: int) -> Tensor:
        """The first `width` keys as attention reads them: turned to their place in the cache where
        positions ask for it."""
        keys = self.store.read(width)[0]
        if self.rotation is None or self._moved == 0:
            return keys
        slots, moved = self.slots, self._moved
        if self._row_seen is None and not slots.holes:
            newest = torch.tensor(self.seen - 1, device=self.device)
            behind = slots.length - 1 - torch.arange(moved, device=self.device)
        else:
            newest = slots.position.amax(-1, keepdim=True)
            behind = slots.count[..., None] - 1 - slots.rank[..., :moved]
        shift = (newest - slots.position[..., :moved] - behind).clamp_min(0)
        return torch.cat(
            [self.rotation.rotate(keys[:, :, :moved], shift, self.seen), keys[:, :, moved:]], 2
        )

    # ---- budget and eviction --------------------------------------------------------------------

    def row_seen(self) -> Tensor:
        """int64 `[b]`: real tokens each row has seen, padding excluded."""
        if self._row_seen is None:
            return torch.full((self.slots.batch,), self.seen)
        return self._row_seen.cpu()

    def _set_limits(self) -> None:
        """Work out how many tokens each head may hold from now on."""
        lengths = [self.seen] if self._row_seen is None else self._row_seen.tolist()
        limits = [self._limit(seen) for seen in lengths]
        if any(limit is None for limit in limits):
            self._limits = None
            return
        rows = torch.stack([limit for limit in limits if limit is not None])
        self._limits = rows.to(self.device)
        self._least_limit, self._most_limit = int(rows.min()), int(rows.max())

    def _limit(self, seen: int) -> Tensor | None:
        if self.budget is None:
            own = self.policy.own_limit(seen)
            return None if own is None else torch.full((self.slots.heads,), own)
        budget = self.policy.peak(self.budget.resolve(seen, self.policy.least_budget))
        return self._spread(budget, self.slots.heads)

    def _evict(self, decoding: bool) -> None:
        if self.frozen or self._limits is None or not self.policy.acts(decoding):
            return
        if self.policy.scope == "model":
            self._evict_all(0, decoding)
        elif self.slots.length > self._least_limit:
            self._evict_to(self._limits_less(0), slack=decoding)

    def _evict_all(self, spare: int, decoding: bool) -> None:
        """The last layer evicts for all of them, leaving room for `spare` more tokens a head."""
        if self.waits:
            return
        layers = [*self.earlier, self]
        keeps = self.policy.select_all(
            [layer.slots for layer in layers],
            [layer._limits_less(spare) for layer in layers],
            self._slack if decoding else 0,
            decoding,
        )
        if keeps is None:
            return
        for layer, keep in zip(layers, keeps, strict=True):
            keep = keep.to(layer.device)
            if not torch.equal(keep, layer.slots.valid):
                layer._compact(keep)

    def _limits_less(self, spare: int) -> Tensor:
        """int64 `[b, K]`: how many tokens each head may hold for `spare` more to fit."""
        assert self._limits is not None
        limits = self._limits
        if spare:
            least = (limits - spare).clamp_min(self.policy.least_budget - 1)  # always kept
            limits = torch.minimum(limits, least)
        return limits.expand(self.slots.batch, self.slots.heads)

    def _with_slack(self, limits: Tensor) -> Tensor:
        """What to cut down to: each row frees by its own least limit, so that it does as it does alone."""
        least = limits.amin(-1, keepdim=True)
        if self._slack is None:
            free = [[self.policy.slack(limit)] for limit in least.flatten().tolist()]
            slack = torch.tensor(free, device=limits.device)
        else:
            slack = torch.full_like(least, self._slack)
        return torch.minimum(limits, (limits - slack).clamp_min(self.policy.least_budget))

    def _evict_to(self, limits: Tensor, slack: bool) -> None:
        """Heads above their limit (int64 `[b, K]`) are cut down to it, the others left alone."""
        slots = self.slots
        over = slots.count > limits
        if not bool(over.any()):
            return
        target = self._with_slack(limits) if slack else limits
        target = torch.where(over, target, limits)  # a head left alone must look so to the policy
        self._weigh()
        self._compact(torch.where(over[..., None], self.policy.select(slots, target), slots.valid))

    def _compact(self, keep: Tensor) -> None:
        """Drop all but `keep` (bool `[b, K, n]`), folded into what stays where the policy says so."""
        slots = self.slots
        into = self.policy.merge_into(slots, keep) if self.policy.merges else None
        if into is not None:
            self.store.merge(into)
        index, holes = packed_index(keep)
        kept = index.shape[-1]
        if self.policy.scope == "model":
            capacity = kept + UNEVEN_HEADROOM
        else:
            capacity = max(kept, min(kept + HEADROOM, self._most_limit + 1))
        self.store.compact(index, capacity)
        slots.compact(index, capacity, holes)
        self._appended = 0
        self.evicted = True
        if self.rotation is not None:
            self._moved = self._count_moved()

    def _count_moved(self) -> int:
        """How many leading slots are not adjacent, in position, to all that follow them.

        The token to come follows them too, so everything has moved once the newest token is evicted.
        """
        position = self.slots.position
        newest = self.row_seen().to(self.device)[:, None, None] - 1
        behind = self.slots.length - 1 - torch.arange(self.slots.length, device=self.device)
        moved = (position >= 0) & (newest - position != behind)
        return int((moved.any(0).any(0) * (self.slots.length - behind)).max())

    def make_room(self, tokens: int) -> None:
        """Evict now, so that `tokens` more can be appended without going over budget.

        What the policy always keeps stays, so a long turn may evict again.
        """
        if not self.is_initialized or self._limits is None:
            return
        if self.policy.scope == "model":
            self._evict_all(tokens, decoding=False)
        else:
            self._evict_to(self._limits_less(tokens), slack=False)

    def _room(self, fresh: int) -> int:
        """Slots to allocate for: a prompt exactly, a decoded token with headroom, within the budget."""
        needed = self.store.length + fresh
        if needed <= self.store.capacity:
            return self.store.capacity
        if fresh > 1:
            return needed
        if self.policy.scope == "model":
            return needed + UNEVEN_HEADROOM
        evicts = not self.frozen and self.policy.acts(decoding=True)
        bounded = evicts and self._limits is not None and self.budget is not None
        most = max(needed, self._most_limit + 1) if bounded else needed + HEADROOM
        return min(needed + HEADROOM, most)

    # ---- what transformers asks of a cache layer -------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens SEEN, padding included, so that position ids stay right; not tokens kept."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens seen after this step, 0): the padding mask spans all that was seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit on what may be seen."""
        return -1

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

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens, then count votes and evict what was postponed.

        Raises `ValueError` for a positive argument, and for a crop behind an eviction.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}"
            )
        remove = -tokens_to_remove
        if not self.is_initialized or (remove == 0 and not self._recorded):
            return
        if remove > self._appended:
            raise ValueError(
                f"crop: asked to take back {remove} tokens, but only {self._appended} were added since "
                "the last eviction and what was evicted before cannot be brought back"
            )
        if remove and not self.record_past and self.policy.needs.votes:
            raise ValueError(
                "crop: these tokens have voted already; call activate_past_recording() before the steps "
                "that may be taken back"
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
        recorded, self._recorded = self._recorded, []
        fresh = sum(query.shape[2] for query, _, _ in recorded) - removed
        if fresh <= 0:
            return
        if self.policy.needs != NOTHING:
            query = torch.cat([query for query, _, _ in recorded], dim=2)[:, :, :fresh]
            real = _join_real(recorded, fresh)
            _, seen = self._attend(query, recorded[0][1], self.policy.needs, real)
            self._observe(seen)
        if self.slots.holes:
            self._close_gaps()
        self._evict(decoding=fresh == 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was."""
        if not self.seen:
            return
        rows = beam_idx.to(self.device)
        self.store.select_rows(rows)
        self.slots.select_rows(rows)
        if self._row_seen is not None:
            self._row_seen = self._row_seen.index_select(0, rows)
        if self._limits is not None and self._limits.shape[0] > 1:
            self._limits = self._limits.index_select(0, rows)
        self._recorded = [
            (
                query.index_select(0, rows),
                scale,
                None if real is None else real.index_select(0, rows),
            )
            for query, scale, real in self._recorded
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.seen:
            rows = torch.arange(self.slots.batch, device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch (indices or a bool mask)."""
        if self.seen:
            rows = torch.arange(self.slots.batch, device=self.device)
            self.reorder_cache(rows[indices.to(self.device)])

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
        self._moved = 0  # leading slots whose keys must be turned when read
        self._limits = None
        self._least_limit = self._most_limit = 0
        self._scale = 1.0
        self._recorded = []

    def offload(self) -> None:
        """Keys and values to the CPU."""
        self.store.to("cpu")

    def prefetch(self) -> None:
        """Keys and values back to the device they came from."""
        if self.is_initialized:
            self.store.to(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        extra = [t for t in (self._row_seen, self._limits) if t is not None]
        extra += [query for query, _, _ in self._recorded]
        return (
            self.store.nbytes
            + self.slots.nbytes
            + sum(tensor.untyped_storage().nbytes() for tensor in extra)
        )

    def _check_same_shape(self, keys: Tensor) -> None:
        held = self.store.keys
        expected = (held.shape[0], held.shape[1], held.shape[3], held.dtype)
        got = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype)
        if got != expected:
            names = "(batch, KV heads, key width, dtype)"
            raise ValueError(
                f"this cache holds {names} = {expected} but was given {got}; a cache belongs to one model "
                "and one batch: make a new one, or call reset()"
            )


def _join_real(recorded: list[tuple[Tensor, float, Tensor | None]], fresh: int) -> Tensor | None:
    """bool `[b, fresh]`: which of the recorded queries are no padding; None when all are tokens."""
    if all(real is None for _, _, real in recorded):
        return None
    parts = [
        query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool) if real is None else real
        for query, _, real in recorded
    ]
    return torch.cat(parts, dim=1)[:, :fresh]
