"""Plan: what an eviction leaves, head by head; slots, store and positions all follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """The outcome of one layer's eviction.

    keep: bool `[b, K, n]`, which of the slots held now stay.
    index: int64 `[b, K, longest]`, those slots, ascending, right-aligned: the last `count` entries
    of a head name its slots, those before mean nothing (but are slots that exist).
    count: int64 `[b, K]`, tokens that stay, on the slots' device; tally: the same on the CPU.
    longest: the largest count.
    into: int64 `[b, K, n]`, for each slot held now the slot whose key and value it is folded into
    (their plain mean, summed in float32), -1 for none; None: nothing is folded.
    best: bool `[b, K, n]`, of those the ones that a store of several tiers holds best; None: nobody
    asked.
    dropped: bool `[b, K, n]`, which of the slots held a token that goes; None: none did.
    columns `[b, K, n, ...]`, counters `[b, K]`: what the policy knows of the slots held now, where
    the eviction changes that.
    """

    keep: Tensor
    index: Tensor
    count: Tensor
    tally: Tensor
    longest: int
    into: Tensor | None = None
    best: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: Tensor | None = None
    _rows: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def keeping(
        cls,
        keep: Tensor,
        into: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        counters: Mapping[str, Tensor] | None = None,
        best: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Plan:
        """From bool `[b, K, n]`. Asks the device for the counts, once."""
        count = keep.sum(-1)
        tally = count.cpu()
        longest = int(tally.max())
        if int(tally.min()) == longest:
            index = keep.nonzero()[:, 2].view(*keep.shape[:2], longest)
        else:
            order = keep.to(torch.uint8).sort(dim=-1, stable=True).indices
            index = order[..., keep.shape[-1] - longest :]
        known = best, columns or {}, counters or {}
        return cls(keep, index, count, tally, longest, into, *known, dropped)

    @cached_property
    def holes(self) -> bool:
        """Whether any head keeps fewer than the longest."""
        return int(self.tally.min()) < self.longest

    @cached_property
    def uneven(self) -> bool:
        """Whether heads keep so different numbers that padding to the longest would cost more than
        a sixteenth.
        """
        padded = self.longest * self.tally.numel()
        return 16 * (padded - int(self.tally.sum())) > padded

    @property
    def mean(self) -> int:
        """Tokens that a head keeps, on average, rounded up."""
        return -(-int(self.tally.sum()) // self.tally.numel())

    def rows(self, room: int) -> Tensor:
        """int64 `[b * K * longest]`: `index` where all slots of all heads, `room` of each, lie one
        after the other.
        """
        if room not in self._rows:
            batch, heads = self.index.shape[:2]
            first = torch.arange(batch * heads, device=self.index.device) * room
            self._rows[room] = (self.index + first.view(batch, heads, 1)).flatten()
        return self._rows[room]

    @property
    def empty(self) -> Tensor | None:
        """bool `[b, K, longest]`: entries of `index` that mean nothing; None: there are none."""
        if not self.holes:
            return None
        place = torch.arange(self.longest, device=self.index.device)
        return place < (self.longest - self.count)[..., None]
