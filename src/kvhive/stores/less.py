"""LESS: what is evicted goes into a low-rank state that is attended to beside the tokens kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvhive.calibration import Profile
from kvhive.kernels import Ask, Observed
from kvhive.kernels.low_rank import FeatureMaps, State, beside
from kvhive.plan import Plan
from kvhive.spec import knob
from kvhive.stores.base import STORES, LayerFacts, Store, StoreKind
from kvhive.stores.dense import DenseStore

METHOD = "less"
SHAPES = {  # L compressed layers, H query heads, K KV heads, D key width, M hidden units, R rank
    "query_in": "L H D M",
    "query_out": "L H M R",
    "key_in": "L K D M",
    "key_out": "L K M R",
    "key_mix": "L K R R",
    "key_gain": "L K R",
    "mix_gain": "L K R",
    "curve": "L T",  # after each of T epochs, the error left, as a share of eviction's alone
    "reach": "1",  # tokens of the longest text they were trained on
}


class LessStore(Store):
    """A dense store (ragged where heads come to differ) and the state of what was evicted from it.

    As long as nothing was, it is that store; and again from the token on that lies beyond the texts
    that the kernels were trained on, where they would answer anything. Policies are told what the
    tokens kept received among themselves. `nbytes` counts the state, R (e + 1) float32 numbers a KV
    head; the learned maps belong to the model, as its weights do, and are shared by all caches with
    one profile.
    """

    def __init__(self, profile: Profile | None, place: int, rank: int) -> None:
        self.length = 0
        self.state: State | None = None
        self._profile, self._place, self._rank = profile, place, rank
        self._kept: Store = DenseStore()
        self._folded = False
        self._reach = 0 if profile is None else int(profile.tensors["reach"])
        self._seen = 0  # tokens appended, padding included
        self._warned = False

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self._kept.room

    @property
    def knows_empty(self) -> bool:
        """As of the tokens kept."""
        return self._kept.knows_empty

    @property
    def mean(self) -> int:
        """Slots that a head holds, on average, rounded up."""
        return self._kept.mean

    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens, with room for `room` slots."""
        if self.state is None:
            batch, heads, _, width = values.shape
            self.state = State.empty(batch, heads, self._rank, width, values.device)
        self._kept.append(keys, values, room)
        self.length = self._kept.length
        self._seen += keys.shape[2]

    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """The tokens kept and the state, merged; the report is of the tokens kept alone."""
        if not self._folded or self._is_beyond():
            return self._kept.attend(query, ask)
        assert self.state is not None
        out, seen = self._kept.attend(query, replace(ask, lse=True))
        assert seen.lse is not None
        rest, weight = self.state.answer(self._maps(query.device).of_queries(query))
        if ask.step.real is not None:
            weight = weight.masked_fill(~ask.step.real[:, None], float("-inf"))
        total = torch.logaddexp(seen.lse, weight) if ask.lse else None
        return beside(out, seen.lse, (rest, weight)), replace(seen, lse=total)

    def report(self, query: Tensor, ask: Ask) -> Observed:
        """What `attend` would report."""
        return self._kept.report(query, ask)

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens kept."""
        return self._kept.view()

    def compact(self, plan: Plan, room: int) -> Store:
        """Fold the tokens that go into the state, with the keys that they have, and drop them."""
        if plan.dropped is not None:
            assert self.state is not None
            keys, values = self._kept.view()
            self.state.fold(self._maps(keys.device), keys, values, plan.dropped)
            self._folded = True
        self._kept = self._kept.compact(plan, room)
        self.length = self._kept.length
        return self

    def resize(self, room: int) -> None:
        """Hold the same in room for `room` slots, no fewer than there are."""
        self._kept.resize(room)

    def take_keys(self, slots: Tensor) -> Tensor:
        """Keys `[N, d]` of the slots marked."""
        return self._kept.take_keys(slots)

    def put_keys(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of the slots marked."""
        self._kept.put_keys(slots, keys)

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`; what was folded stays."""
        self._seen -= self.length - length
        self._kept.truncate(length)
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        self._kept.select_rows(rows)
        if self.state is not None:
            self.state.select_rows(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens kept, spare room included, and of the state."""
        return self._kept.nbytes + (0 if self.state is None else self.state.nbytes)

    def _is_beyond(self) -> bool:
        """Whether the text is longer than those of the training. Warns when it becomes so."""
        beyond = self._seen > self._reach
        if beyond and not self._warned and self._place == 0:
            warnings.warn(
                f"less: its kernels were trained on texts of up to {self._reach:,} tokens; from "
                "there on what was evicted is left out; kvhive train-less trains on longer ones",
                stacklevel=2,
            )
        self._warned |= beyond
        return beyond

    def _maps(self, device: torch.device) -> FeatureMaps:
        if self._profile is None:
            raise ValueError("less needs trained kernels to evict: give a profile of the model")
        return maps_of(self._profile, self._place, device)


_KNOWN: WeakKeyDictionary[Profile, dict[tuple[int, torch.device], FeatureMaps]] = (
    WeakKeyDictionary()
)


def maps_of(profile: Profile, place: int, device: torch.device) -> FeatureMaps:
    """The maps of the layer at `place` among the compressed ones, float32, made once a device."""
    known = _KNOWN.setdefault(profile, {})
    if (place, device) not in known:
        weights = (profile.tensors[name][place] for name in FeatureMaps.names())
        known[place, device] = FeatureMaps(*(one.to(device, torch.float32) for one in weights))
    return known[place, device]


@STORES.register(METHOD)
@dataclass(frozen=True)
class Less(StoreKind):
    """Keep the tokens in full, and fold those that are evicted into a low-rank state.

    Its kernels are trained once for a model, by `kvhive train-less`. The state is float32: it costs
    as much as `rank` tokens in 16 bits. Keys must stay as they were written.

    Source: arXiv:2402.09398.
    """

    source: ClassVar[str] = "arXiv:2402.09398"
    calibration: ClassVar[str | None] = METHOD
    rewritable: ClassVar[bool] = False
    example: ClassVar[str] = "h2o@0.1"

    rank: int = knob(8, "features of a token, which the kernels were trained for", least=1)
    profile: str | None = knob(
        None, "file of the trained kernels; none: those that come with kvhive"
    )

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """See the base."""
        profile.check_tensors(SHAPES)
        of_layers, of_heads, rank = profile.tensors["key_gain"].shape
        if (of_layers, of_heads) != (layers, kv_heads):
            raise ValueError(
                f"these kernels are of {of_layers} layers with {of_heads} KV heads, not of "
                f"{layers} with {kv_heads}; train some for this model with kvhive train-less"
            )
        if rank != self.rank:
            raise ValueError(
                f"less: rank must be that of its kernels, {rank}, got {self.rank}; write "
                f"rank={rank}, or train others with kvhive train-less --rank {self.rank}"
            )

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> LessStore:
        """An empty store, which needs the profile as soon as something goes."""
        return LessStore(facts.profile, facts.place, self.rank)
