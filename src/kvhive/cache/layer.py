"""HiveLayer: one layer of the cache. Append, attend, observe, evict, in that order, every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvhive.cache import room
from kvhive.cache.eviction import Eviction, excess_together, plan_together
from kvhive.cache.handoff import offer
from kvhive.cache.interface import CacheLayer
from kvhive.cache.late_votes import LateVotes, patience
from kvhive.cache.modes import plain
from kvhive.cache.pending import Pending
from kvhive.cache.positions import Turning
from kvhive.cache.progress import Progress
from kvhive.calibration import Profile
from kvhive.kernels import NOTHING, Ask, Held, Needs, Observed, Viewed
from kvhive.model.facts import ModelFacts, facts_of
from kvhive.plan import Plan
from kvhive.policies import Policy
from kvhive.rope import Rotation
from kvhive.slots import Slots
from kvhive.step import Phase, Step, in_order
from kvhive.stores import LayerFacts, Store, StoreKind

REPEATING = Needs(queries=True, keys=True)  # of the second pass (`cache/reconstruction.py`)


class HiveLayer(CacheLayer):
    """Keys, values and slots of one attention layer, kept within the policy's limits.

    policy: who decides. kind: the form of storage. progress: what all layers of the cache share,
    `place` being this one's among them; layers: all of them, once they are made (those before this
    one are). rotation: given when positions are counted inside the cache. written: how the model
    turned the keys it wrote, where that is known. profile: of the model, for the store.

    lent: whether later layers attend to what this one holds (`cache/sharing.py`), or a step of it
    ends with theirs; the last of them calls `close`.
    """

    def __init__(
        self,
        policy: Policy,
        kind: StoreKind,
        progress: Progress,
        place: int,
        layers: Sequence[HiveLayer],
        rotation: Rotation | None = None,
        written: Rotation | None = None,
        profile: Profile | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy, self.progress, self.place = policy, progress, place
        self.eviction = Eviction(policy, progress.limits, place)
        self.turning = Turning(rotation)
        self.written = written
        self.layers = layers
        self.facts: ModelFacts | None = None  # of the model whose tokens these are
        self.lent = False
        self._kind, self._profile = kind, profile
        self.reset()

    @plain
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dtype and device from the first tensors, never from a config."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self._held_shape = self._shape(key_states)
        width = key_states.shape[-1] + value_states.shape[-1]
        self._token_bytes = width * key_states.element_size()
        columns = {**self.policy.columns, **self.turning.columns}
        self.slots = Slots(batch, heads, columns, self.policy.counters, self.device)
        self.slots.before_reading = self._hear
        self.is_initialized = True

    def reset(self) -> None:
        """Back to empty; settings stay."""
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")
        earlier = [layer.store for layer in self.layers[: self.place]]
        facts = LayerFacts(self.place, self.progress.layers, self._profile)
        self.store: Store = self._kind.new(facts, earlier)
        self.slots = Slots(0, 0, {}, {}, self.device)
        self.evicted = False
        self.appended = 0  # tokens added since the last eviction: what `crop` can take back
        self.pending: list[Pending] = []  # steps that `crop` may still take back
        self._waiting: tuple[Tensor, Tensor] | None = None  # handed in, not attended yet
        self.step: Step | None = None  # attended to, and not closed yet
        self.late = LateVotes()
        self._scale = 1.0
        self._growing = 1  # tokens that the next step may bring, as the last one did
        self.turning.reset()
        self.eviction.forget()
        if self.place == 0:
            self.progress.reset()

    # ---- the step -------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys `[b, K, q, d]` and values `[b, K, q, e]`, to be attended to next.

        They are returned as they are, the keys carrying this layer, so that the attention function
        finds it; what is held stays in the store. Raises `ValueError` if the cache was made for
        another model or batch, or if the last tokens handed in were never attended to.
        """
        if self._waiting is not None:
            raise _unread()
        if not self.slots.length:
            self.lazy_initialization(key_states, value_states)
        else:
            self.check_shape(key_states)
        # Detached, what is kept holds no graph, nor the tensor that refers to this layer.
        self._waiting = key_states.detach(), value_states.detach()
        return offer(key_states, self), value_states

    def check_model(self, config: object) -> None:
        """Raises `ValueError` unless this is the config of the model that the cache was made for.

        A cache that was pickled knows its model by the fingerprint and the dtype of the weights.
        """
        facts = self.facts
        if facts is None or config is None or config is facts.config:
            return
        theirs = facts_of(config)
        ours = facts.fingerprint, facts.dtype
        if theirs is None or (theirs.fingerprint, theirs.dtype) != ours:
            raise ValueError(
                f"this cache was made for another {facts.family} than the model that it is used "
                "with; a cache belongs to one model: make one with HiveCache.for_model"
            )
        for layer in self.layers:
            layer.facts = theirs

    @plain
    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Attention of the tokens handed in last, `[b, H, q, d]` -> `[b, H, q, e]`, and then the
        eviction.

        mask: bool `[b, tokens]`, False for padding, as `Progress.begin` reads it.
        """
        keys, values = self._taken()
        if self.step is not None:
            raise _unread()
        step = self.progress.begin(self.place, keys, mask)
        if step.order is not None:
            query, keys, values = (in_order(part, step.order) for part in (query, keys, values))
        repeating = self.progress.repeats is not None
        if not repeating:
            self._growing = step.fresh if self.store.length else 1
        recording, later = self.progress.recording, self._may_vote_later(step)
        if not later:
            self._hear()
        self._append(keys, values, step)
        needs = NOTHING if recording or later else self.policy.needs
        needs = REPEATING if repeating else needs
        out, seen = self.store.attend(query, self._ask(step, scale, needs))
        if repeating:
            repeated = self.progress.repeated(self.slots.length).to(self.device)
            self.policy.observe_reconstruction(self.slots, seen, repeated)
        elif recording:
            votes = query if self.policy.needs.votes else None
            self.pending.append(Pending.of(step, scale, votes, keys, values))
        elif later:
            self._scale = seen.scale
            self.late.add(query, seen.scale)
            if len(self.late) >= self._patience:
                self._hear()
        else:
            self._notice(seen)
        self.progress.finish()
        self.step = step
        if not self.lent:
            self.close()
        return out if step.order is None else in_order(out, step.order.argsort(1))

    def lend(self, query: Tensor, scale: float) -> Tensor:
        """Attention of a later layer's queries, `[b, H, q, d]` -> `[b, H, q, e]`, to what is held
        here with the tokens of the step. The policy hears nothing of it.
        """
        step = self.step
        assert step is not None
        if step.order is not None:
            query = in_order(query, step.order)
        out, _ = self.store.attend(query, self._ask(step, scale, NOTHING))
        return out if step.order is None else in_order(out, step.order.argsort(1))

    def close(self) -> None:
        """The step is over: all who attend to what is held have done so, and something may go."""
        step, self.step = self.step, None
        if step is not None and not self.progress.waits:
            self._fit(step)
        self._pack_after_step()

    @plain
    def replay(
        self, keys: Tensor, values: Tensor, seen: Observed, phase: Phase | None = None
    ) -> None:
        """A step without padding whose attention was computed elsewhere: append, observe, evict.

        Shapes as in `update`. seen: what the store would have reported for this policy's `needs`.
        Several layers can so learn from one pass of the model.
        """
        if not self.slots.length:
            self.lazy_initialization(keys, values)
        step = self.progress.begin(self.place, keys, phase=phase)
        self._hear()
        self._append(keys, values, step)
        self._conclude(step, seen)
        self._pack_after_step()
        self.progress.finish()

    def settle(self, pending: Pending) -> None:
        """A prompt that was recorded and stays: observe and evict after all."""
        self._conclude(pending.step, self._reported(pending))
        self._pack_after_step()

    def accept(self, pending: Pending) -> None:
        """A drafted token that was accepted: what decoding it would have left."""
        assert pending.keys is not None and pending.values is not None
        step = self.progress.begin(self.place, pending.keys, pending.step.real, phase="decode")
        self._hear()
        self._append(pending.keys, pending.values, step)
        self._conclude(step, self._reported(replace(pending, step=step)))
        self._pack_after_step()
        self.progress.finish()

    def _taken(self) -> tuple[Tensor, Tensor]:
        if self._waiting is None:
            raise ValueError("attention came twice for the same tokens of this cache")
        waiting, self._waiting = self._waiting, None
        return waiting

    def _append(self, keys: Tensor, values: Tensor, step: Step) -> None:
        frozen = self.progress.frozen > 0
        self.store.append(keys, values, room.for_step(self.store, step, self.eviction, frozen))
        self.slots.append(step, self.store.room)
        self.appended += step.fresh

    def _ask(self, step: Step, scale: float, needs: Needs) -> Ask:
        unknown = self.slots.gaps or (self.slots.holes and not self.store.knows_empty)
        return Ask(step, scale, needs, self.slots.valid if unknown else None)

    def _reported(self, pending: Pending) -> Observed:
        """What attention would have reported of tokens that are the last in the store."""
        if pending.query is None:
            return Observed(pending.step.fresh, scale=pending.scale)
        ask = self._ask(pending.step, pending.scale, self.policy.needs)
        return self.store.report(pending.query, ask)

    def _conclude(self, step: Step, seen: Observed) -> None:
        """Let the policy take notice, and evict."""
        self._notice(seen)
        self._fit(step)

    def _notice(self, seen: Observed) -> None:
        self._scale = seen.scale
        if seen.queries is not None:
            seen = replace(seen, rotation=self.written)
        self.policy.observe(self.slots, seen)

    def _fit(self, step: Step) -> None:
        """Evict, where a step has brought too much."""
        if step.phase != "decode":
            self.eviction.forget()
            self._close_gaps()
        if self.progress.frozen or (step.phase == "decode" and not self.eviction.decoding):
            self.eviction.forget()
        elif self.eviction.due(self.slots, step.fresh):
            self.evict(decoding=step.phase == "decode")

    def _may_vote_later(self, step: Step) -> bool:
        """Whether what attention gave in this step can be worked out together with later steps."""
        singly = step.phase == "decode" and step.real is None
        return singly and not self.progress.recording and self._patience > 1

    @property
    def _patience(self) -> int:
        return patience(self.policy.needs.together, self.slots.length)

    @plain
    def _hear(self) -> None:
        """Let the queries vote that have waited; nothing they saw has gone since."""
        if len(self.late):
            step, query = self.late.take(self.progress.seen)
            ask = self._ask(step, self.late.scale, self.policy.needs)
            self.policy.observe(self.slots, self.store.report(query, ask))

    # ---- eviction -------------------------------------------------------------------------------

    def evict(self, decoding: bool, spare: int = 0) -> None:
        """Drop what is too much, so that `spare` more tokens fit. decoding: with slack.

        Where layers compete, the last of them evicts for all.
        """
        self._hear()
        if not self.eviction.together:
            self._close_gaps()
            self.follow(self.eviction.plan(self.slots, self.held(), decoding, spare))
        elif self.place == len(self.layers) - 1:
            self._evict_together(decoding, spare)

    def _evict_together(self, decoding: bool, spare: int) -> None:
        evictions = [layer.eviction for layer in self.layers]
        slots = [layer.slots for layer in self.layers]
        if excess_together(evictions, slots, decoding, spare) is None:
            return
        for layer in self.layers:
            layer._close_gaps()
        helds = [layer.held() for layer in self.layers]
        plans = plan_together(evictions, slots, helds, decoding, spare)
        for layer, plan in zip(self.layers, plans, strict=True):
            layer.follow(plan)

    @plain
    def make_room(self, tokens: int) -> None:
        """Evict now, so that `tokens` more can be appended without going over budget.

        What the policy always keeps stays, so a long turn may evict again.
        """
        if self.slots.length:
            self.evict(decoding=False, spare=tokens)
            self._pack_after_step()

    def shrink(self, room: int) -> None:
        """Give back room beyond `room` slots, made for tokens that were taken back."""
        if self.store.room > max(room, self.slots.length):
            room = max(room, self.slots.length)
            self.store.resize(room)
            self.slots.resize(room)

    @property
    def positions(self) -> Tensor:
        """int32 `[b, K, n]` on the CPU: of the tokens held, -1 for empty slots."""
        position = self.slots.position.cpu()
        self.slots.pack(self.store.nbytes)
        return position

    def held(self) -> Held:
        """What is held, for policies that score it."""
        return Viewed(self.store.view, self._scale, self.written)

    def follow(self, plan: Plan | None) -> None:
        """Carry a plan out; None: nothing goes."""
        if plan is None:
            return
        self.slots.adopt(plan)
        wanted = room.after_eviction(plan, self._growing, self.eviction)
        self.store = self.turning.compact(self.store, self.slots, plan, wanted, self.progress.seen)
        self.slots.pack(self.store.nbytes)
        self.eviction.forget()
        self.evicted, self.appended = True, 0

    def _pack_after_step(self) -> None:
        """Pack what is due, of all layers when the last of those that are evicted from together is
        through.
        """
        if not self.eviction.together:
            self._pack()
        elif self.place == len(self.layers) - 1:
            for layer in self.layers:
                layer._pack()

    def _pack(self) -> None:
        """Let the store pack what is due, and hold no empty slots, unless what the step brought may
        still be taken back, or is to be read once more.
        """
        if not (self.pending or self.progress.reading):
            if self.store.due:
                self._hear()  # of keys as they were attended to
                self._close_gaps()
            if not self.slots.gaps:
                unknown = self.slots.holes and not self.store.knows_empty
                self.store.pack(self.slots.valid if unknown else None)
        self.slots.pack(self.store.nbytes)

    def _close_gaps(self) -> None:
        """Move padding that came after tokens to the front of its row, where empty slots belong."""
        if not self.slots.gaps:
            return
        valid = self.slots.valid
        self.slots.gaps = bool((valid[:, :, :-1] & ~valid[:, :, 1:]).any())
        if not self.slots.gaps:
            self.slots.recount()
        if self.slots.gaps or self.store.knows_empty:
            plan = Plan.keeping(valid)
            self.store = self.store.align(plan, self.store.room)
            self.slots.compact(plan, self.store.room)
            self.eviction.forget()

    # ---- rows, and tokens taken back -------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether accepting drafted tokens changes nothing but the number of tokens held."""
        quiet = not self.policy.needs.votes and not self.store.packs
        return quiet and self.eviction.spares(self.slots)

    @plain
    def truncate(self, tokens: int) -> None:
        """Forget the newest tokens (`speculation.crop` says when that is allowed)."""
        self._hear()
        length = self.slots.length - tokens
        self.slots.truncate(length)
        self.store.truncate(length)
        self.appended -= tokens
        self.eviction.forget()

    @plain
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was (int64 `[new batch]`)."""
        if not self.slots.length:
            return
        self._hear()
        rows = beam_idx.to(self.device)
        self.turning.select_rows(self.slots, rows)
        self.store.select_rows(rows)
        self.slots.select_rows(rows)
        self._held_shape = (self.slots.batch, *self._held_shape[1:])
        self.pending = [pending.select_rows(rows) for pending in self.pending]
        self.eviction.forget()
        if self.place == 0:
            self.progress.select_rows(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        held = self.store.nbytes + self.slots.nbytes + self.turning.nbytes + self.late.nbytes
        return held + sum(pending.nbytes for pending in self.pending)

    @property
    def full_nbytes(self) -> int:
        """Bytes of keys and values that the full cache would hold for the tokens seen."""
        return self.slots.batch * self.slots.heads * self.get_seq_length() * self._token_bytes

    @staticmethod
    def _shape(keys: Tensor) -> tuple[int, ...]:
        return keys.shape[0], keys.shape[1], keys.shape[3]

    def check_shape(self, keys: Tensor) -> None:
        """Raises `ValueError` unless new keys `[b, K, q, d]` have the sizes of those held."""
        if self._shape(keys) != self._held_shape:
            raise ValueError(
                f"this cache holds (batch, KV heads, key width) = {self._held_shape} but was given "
                f"{self._shape(keys)}; a cache belongs to one model and one batch: make a new one, "
                "or call reset()"
            )


def _unread() -> ValueError:
    return ValueError(
        "attention did not read the last tokens of this cache: either its model changes the keys "
        "between cache and attention or uses another attention than 'kvhive' (HiveCache.for_model "
        "sets it), or the last step failed halfway; make a new cache, or call reset()"
    )
