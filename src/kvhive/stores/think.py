"""ThinK: the channels of keys that the prompt's last queries use least are dropped.

Source: Xu et al. 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv:2407.21018, and
its repository (SalesforceAIResearch/ThinK, eager variant). For query heads that share a KV head the
mean of their energies, as in kvpress: the repository repeats the keys instead, and saves less than
it prunes. Thinning once more while decoding is an addition (`rethin=none` is the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kvhive.kernels import Ask, Observed
from kvhive.spec import knob
from kvhive.step import Step
from kvhive.stores._energy import Latest, QueryEnergy, best_channels, key_energy
from kvhive.stores._packed import PackedKind, PackedStore, Packing
from kvhive.stores._rows import PerToken
from kvhive.stores._thin import Thinned
from kvhive.stores._whole import Exactly
from kvhive.stores._widths import bits_knob, check_bits, due_in_groups, group_for
from kvhive.stores.base import STORES, LayerFacts, Store
from kvhive.stores.dense import DenseStore


@STORES.register("think")
@dataclass(frozen=True)
class Think(PackedKind):
    """Older tokens keep the channels of their keys whose energy, over the prompt's last queries and
    over all keys that survive the eviction, is largest; each KV head chooses its own.

    Chosen once, at the end of the first prompt of more than `recent` tokens. What comes later is
    held whole, unless it is thinned anew. A prompt that is read in chunks ends with the last of
    those of one `read`; where transformers cuts it up (`prefill_chunk_size`), each is a prompt.
    """

    rewritable: ClassVar[bool] = False
    shareable: ClassVar[bool] = False

    keep: float = knob(0.6, "share of a head's channels that older keys keep", least=0.0, most=1.0)
    recent: int = knob(32, "newest tokens that stay whole", least=0)
    window: int = knob(32, "last queries of the prompt that choose", least=1)
    value_bits: int | None = bits_knob("of older values; none: exact", None)
    rethin: int | None = knob(
        None, "tokens after which what was decoded is thinned too; none: never", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, "value_bits")
        if self.keep == 0:
            raise ValueError("think: keep must be more than 0, or no key is left; got 0.0")

    @property
    def fullest(self) -> Think:
        """Whole keys, or as many as come between two thinnings: answers displace what is thin."""
        if self.rethin is None:
            return replace(self, keep=1.0)
        return replace(self, recent=self.recent + self.rethin)

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> Store:
        """An empty store; a dense one where nothing is to be thinned."""
        return DenseStore() if self.keep == 1 and self.value_bits is None else ThinkStore(self)

    def packing(self, key_width: int, value_width: int) -> Packing:
        """See the base; keys are thinned when the store has seen a prompt."""
        group = group_for(self.name, value_width, None) if self.value_bits else 0
        return Packing(
            keys=(),
            values=(PerToken(self.value_bits, group) if self.value_bits else Exactly(),),
            sinks=0,
            keys_due=_nothing,
            values_due=self._values_due if self.value_bits else _nothing,
        )

    def pruned(self, width: int) -> int:
        """Channels of a head that older keys lose: the product rounded down, but never all."""
        return min(math.floor(width * round(1 - self.keep, 12)), width - 1)

    def _values_due(self, tail: int) -> int:
        return due_in_groups(tail, self.recent)


def _nothing(tail: int) -> int:
    return 0


class ThinkStore(PackedStore):
    """Thin keys in rows of their own, behind them the newest ones whole; values as they are, or in
    few bits.

    Until a prompt has ended no key is thinned; of its queries nothing is kept but their energy.
    """

    def __init__(self, kind: Think) -> None:
        super().__init__(kind)
        self._think = kind
        self._latest: Latest | None = None  # of the step whose tokens may still be taken back
        self._energy: QueryEnergy | None = None  # of the steps before it
        self._unfinished = False  # the prompt goes on in the next step
        self._due_now = False  # a prompt has ended
        self._fresh = 0  # tokens that came since keys were thinned

    def _packing(self, key_width: int, value_width: int) -> Packing:
        packing = super()._packing(key_width, value_width)
        values_due = packing.values_due if self._think.value_bits else self._keys_due
        return replace(packing, keys_due=self._keys_due, values_due=values_due)

    def _keys_due(self, tail: int) -> int:
        every = self._think.rethin
        now = self._due_now or (every is not None and self._fresh >= every)
        return max(0, tail - self._think.recent) if now and self._can_thin else 0

    @property
    def _chosen(self) -> bool:
        return bool(self._keys.parts)

    @property
    def _can_thin(self) -> bool:
        return self._chosen or bool(self._keys.forms)

    @property
    def due(self) -> bool:
        """See the base."""
        return self._due_now or super().due

    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens, whole."""
        super().append(keys, values, room)
        self._fresh += keys.shape[2]

    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """As every packed store; queries of a prompt leave their energy behind."""
        if not self._chosen:
            self._watch(query, ask.step)
        return super().attend(query, ask)

    def _watch(self, query: Tensor, step: Step) -> None:
        one_of_it = step.phase == "decode" and (self._unfinished or not step.ends)
        if step.phase == "prefill" or one_of_it:  # a chunk may be a single token
            self._listen()
            self._latest = Latest.of(query, step.real, self.heads, self._think.window, self.length)
            self._unfinished, self._due_now = not step.ends, step.ends

    def _listen(self) -> None:
        """The tokens of the latest prompt stay: count its queries."""
        if self._latest is not None:
            self._energy = self._latest.after(self._energy, self._think.window)
            self._latest = None

    def pack(self, valid: Tensor | None = None) -> None:
        """Choose channels where a prompt has ended, and thin what is due."""
        self._listen()
        first = self._due_now and not self._chosen
        if first:
            self._choose(None if valid is None else valid.flatten(0, 1))
        thinning = self._keys_due(self._keys.exact.tail) > 0 if self.length else False
        super().pack(valid)
        self._due_now = False
        if thinning:
            self._fresh = 0
        if first and self._chosen:
            self._keys.forms, self._energy = (), None  # thin rows know their channels
            for side in self._sides:
                side.exact.tighten()

    def _choose(self, valid: Tensor | None) -> None:
        """valid: bool `[R, length]`, False for empty slots; None: the store knows them."""
        exact, missing = self._keys.exact, self._keys.exact.missing
        held = valid if missing is None else ~missing
        energy, most = key_energy(exact.tokens, held)
        if most <= self._think.recent or self._energy is None:
            return
        width = exact.tokens.shape[2]
        score = self._energy.mean.flatten(0, 1) * energy
        channels = best_channels(score, self._think.pruned(width))
        self._keys.forms = (Thinned(Exactly(), channels, width),)

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`, and the energy of their queries."""
        if self._latest is not None:
            self._latest = self._latest.until(length)
        self._fresh = max(0, self._fresh - (self.length - length))
        super().truncate(length)

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        super().select_rows(rows)
        if self._latest is not None:
            self._latest = self._latest.select_rows(rows)
        if self._energy is not None:
            self._energy = self._energy.select_rows(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, what queries left included."""
        watched = (self._latest, self._energy)
        return super().nbytes + sum(one.nbytes for one in watched if one is not None)
