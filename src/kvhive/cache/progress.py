"""How far a cache has come: what all of its layers share, decided once a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kvhive.cache.limits import Limits
from kvhive.step import Phase, Step


class Progress:
    """The tokens that a cache's rows have seen, and the step that is under way.

    layers: how many compressed layers go through each step, in order. frozen: how many calls of
    `freeze` wait for their thaw. recording: votes and evictions wait for `crop`. reading: a second
    pass comes after the step. repeats: int64 `[b, 2]` while it runs: where what it repeats begins
    and ends, in tokens before its own. more: whether the prompt goes on after the step.
    """

    def __init__(self, layers: int, limits: Limits) -> None:
        self.layers, self.limits = layers, limits
        self.frozen = 0
        self.recording = False
        self.reading = False
        self.repeats: Tensor | None = None
        self.opening = False  # recording, and no step was taken since it began
        self.reset()

    def reset(self) -> None:
        """Nothing seen; settings stay."""
        self.seen = 0  # tokens, padding included
        self.rows: Tensor | None = None  # int64 [b]: real tokens, once any row was padded
        self._tally = torch.zeros(0, dtype=torch.int64)  # the same on the CPU, or more
        self._step: Step | None = None
        self.more = False
        self._done = self.layers  # layers that have gone through the step
        self.limits.reset()

    @property
    def waits(self) -> bool:
        """Whether what the steps bring is not evicted from: it may, or will, be taken back."""
        return self.recording or self.repeats is not None

    # ---- the step -------------------------------------------------------------------------------

    def begin(
        self, layer: int, keys: Tensor, mask: Tensor | None = None, phase: Phase | None = None
    ) -> Step:
        """The step that brings `keys` `[b, K, q, d]` to a layer; the same for all layers.

        mask: bool `[b, tokens]`, False for padding; those of the step are the last of the tokens
        seen, and what is behind them is not looked at. None: no padding. phase: None where the
        number of tokens says it. Raises `ValueError` when the last step did not reach all layers.
        """
        if layer == 0:
            if self._done < self.layers:
                raise ValueError(
                    f"the last step reached {self._done} of {self.layers} layers of this cache: it "
                    "failed halfway, or its model uses another attention than 'kvhive' "
                    "(HiveCache.for_model sets it); make a new cache, or call reset()"
                )
            step = replace(self._next(keys, mask, phase), ends=not self.more)
            self._step, self._done = step, 0
            if phase is not None or not self.waits:
                self.limits.follow(step, self.lengths(), keys.shape[1])
        if self._step is None or layer != self._done or keys.shape[2] != self._step.fresh:
            raise ValueError(
                f"layer {layer} of this cache was given {keys.shape[2]} tokens out of turn: all "
                "layers take every step one after the other; make a new cache, or call reset()"
            )
        return self._step.on(keys.device)

    def seen_by(self, layer: int) -> int:
        """Tokens that a layer has seen, padding included."""
        if self._step is None or layer < self._done:
            return self.seen
        return self.seen - self._step.fresh

    def finish(self) -> None:
        """A layer has gone through the step."""
        self._done += 1
        if self._done == self.layers:
            self._step = None

    def _next(self, keys: Tensor, mask: Tensor | None, phase: Phase | None) -> Step:
        fresh, first = keys.shape[2], self.seen
        if phase is None:
            phase = self._phase(fresh)
        real = None if mask is None else self._real(mask[:, : first + fresh][:, -fresh:])
        self.seen += fresh
        if real is None and self.rows is None:
            return Step.plain(first, fresh, phase)
        if self.rows is None:
            self.rows = torch.full((len(keys),), first, device=keys.device)
            self._tally = torch.full((len(keys),), first)
        return self._padded(real, fresh, phase)

    def _phase(self, fresh: int) -> Phase:
        """Drafts are verified, but what comes first while recording is a prompt with its draft."""
        if self.repeats is not None:
            return "verify"
        opening, self.opening = self.opening, False
        if self.recording:
            return "prefill" if opening and fresh > 1 else "verify"
        return "decode" if fresh == 1 else "prefill"

    def _real(self, mask: Tensor) -> Tensor | None:
        """Which of the step's tokens are no padding, bool `[b, q]`; None: all.

        In a batch that was padded once, the device is not asked about a single token.
        """
        if mask.shape[1] == 1 and self.rows is not None:
            return mask
        return None if bool(mask.all()) else mask

    def _padded(self, real: Tensor | None, fresh: int, phase: Phase) -> Step:
        """A step of rows that are not alike, or become so by its padding."""
        assert self.rows is not None
        brings: int | Tensor = fresh
        order: Tensor | None = None
        if real is None:
            place = torch.arange(fresh, device=self.rows.device)
            position, self.rows = self.rows[:, None] + place, self.rows + fresh
        else:
            if fresh > 1:
                brings = real.sum(1).cpu()
                if bool((real[:, :-1] & ~real[:, 1:]).any()):
                    order = real.to(torch.uint8).sort(dim=1, stable=True).indices  # padding first
                    real = real.gather(1, order)
            position = (self.rows[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
            self.rows = self.rows + real.sum(1)
        self._tally = self._tally + brings
        last = int(self._tally.max()) - 1
        return Step(phase, fresh, position, last, brings, real, order)

    @contextmanager
    def reconstruction(self) -> Iterator[None]:
        """While a step and its second pass are under way."""
        self.reading = True
        try:
            yield
        finally:
            self.reading = False

    def repeated(self, slots: int) -> Tensor:
        """bool `[b, 1, slots]` on the CPU: which of a layer's slots the step of the second pass
        repeats, its own tokens being the last.
        """
        assert self.repeats is not None
        assert self._step is not None
        slot = torch.arange(slots)
        first, last = (slots - self._step.fresh - self.repeats)[:, :, None, None].unbind(1)
        return (slot >= first) & (slot < last)

    # ---- rows -----------------------------------------------------------------------------------

    def lengths(self) -> list[int]:
        """Real tokens each row has seen, as the CPU knows it; one entry where all are alike."""
        return [self.seen] if self.rows is None else self._tally.tolist()

    def row_seen(self, batch: int) -> Tensor:
        """int64 `[b]` on the CPU: real tokens each row has seen, padding excluded."""
        return torch.full((batch,), self.seen) if self.rows is None else self.rows.cpu()

    def take_back(self, tokens: int, real: Tensor | None) -> None:
        """Forget the newest tokens; real: int64 `[b]`, how many of them are no padding."""
        self.seen -= tokens
        if self.rows is not None:
            assert real is not None
            self.rows = self.rows - real.to(self.rows.device)
            self._tally = self.rows.cpu()

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        if self.rows is not None:
            self.rows = self.rows.index_select(0, rows.to(self.rows.device))
            self._tally = self._tally.index_select(0, rows.cpu())
        self.limits.select_rows(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        rows = 0 if self.rows is None else self.rows.untyped_storage().nbytes()
        return rows + self._tally.untyped_storage().nbytes() + self.limits.nbytes
