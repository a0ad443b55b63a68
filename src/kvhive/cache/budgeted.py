"""BudgetedLayer: what one layer of the cache holds, kept within a policy's budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvhive.budget import Budget
from kvhive.cache.contract import LayerContract
from kvhive.cache.limits import Limits, Spread
from kvhive.cache.positions import Placement
from kvhive.kernels import Observed
from kvhive.policies import Policy
from kvhive.rope import Rotation
from kvhive.slots import Slots, packed_index
from kvhive.stores import StoreKind

HEADROOM = 128  # slots allocated ahead while decoding: one copy of the cache per so many tokens
UNEVEN_HEADROOM = 32  # the same where the longest head has no bound of its own


class BudgetedLayer(LayerContract):
    """Keys, values and slots of one attention layer: limits, room and eviction.

    policy: who decides. budget: how much a head may hold (None: the policy sizes itself).
    spread: (budget per head, KV heads) -> int64 `[kv_heads]`, this layer's part of the allocation.
    rotation: given when positions are counted inside the cache. slack: see `Recipe`.
    written: how the model turned the keys it wrote, where that is known.
    frozen: evict nothing. earlier: with a policy of scope "model", the compressed layers before
    this one, for which it evicts once it has attended; waits: whether a later layer does so for
    this one.
    """

    _row_seen: Tensor | None  # int64 [b], real tokens of each row, once any row was padded
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
        self.frozen = False
        self.earlier: Sequence[BudgetedLayer] = ()
        self.waits = False
        self._kind = store
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dtype and device from the first tensors, never from a config."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        policy = self.policy
        self.slots = Slots(batch, heads, policy.columns, policy.counters, self.device)
        self.is_initialized = True

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

    # ---- budget -------------------------------------------------------------------------------

    def row_seen(self) -> Tensor:
        """int64 `[b]`: real tokens each row has seen, padding excluded."""
        if self._row_seen is None:
            return torch.full((self.slots.batch,), self.seen)
        return self._row_seen.cpu()

    def _lengths(self) -> list[int]:
        return [self.seen] if self._row_seen is None else self._row_seen.tolist()

    def _set_limits(self, fresh: int) -> None:
        """A share is taken of the tokens seen whenever a step brought several of them."""
        if fresh > 1:
            self._prompted = True
        if fresh > 1 or not self._prompted or self.limits.budget is None:
            self.limits.set(self._lengths(), self.slots.heads, self.device)

    def _limits(self, spare: int) -> Tensor:
        return self.limits.less(spare, self.slots.batch, self.slots.heads)

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

    # ---- eviction -----------------------------------------------------------------------------

    def _evict(self, decoding: bool) -> None:
        if self.frozen or self.limits.rows is None or not self.policy.acts(decoding):
            return
        if self.policy.scope == "model":
            self._evict_all(0, decoding)
        elif self.slots.length > self.limits.least:
            self._evict_to(self._limits(0), slack=decoding)

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

    def _read_keys(self, width: int) -> Tensor:
        """The first `width` keys as attention reads them."""
        return self.placement.place(self.store.read(width)[0], self.slots, self.seen)

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

    # ---- what is held -------------------------------------------------------------------------

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

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        extra = [t for t in (self._row_seen, self.limits.rows) if t is not None]
        return (
            self.store.nbytes
            + self.slots.nbytes
            + self.placement.nbytes
            + sum(tensor.untyped_storage().nbytes() for tensor in extra)
        )
