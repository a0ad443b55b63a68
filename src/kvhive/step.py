"""Step: one forward of the model, decided once for all layers of a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["prefill", "decode", "verify"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward brings.

    phase: "prefill" (a prompt, a chunk of one, a turn), "decode" (one token a row), "verify"
    (tokens that `crop` may take back).
    fresh: tokens it brings to each row, padding included.
    position: of its tokens: that of the first as an int, where all rows agree and none is padded;
    else int64 `[b, fresh]`, -1 for padding.
    last: the highest position that any row may have reached with it.
    brings: real tokens it brings: an int where all rows agree, else int64 `[b]` on the CPU. While
    decoding in a padded batch it is the most there can be, because asking would stall the device.
    real: bool `[b, fresh]`, False for padding; None: there is none.
    order: int64 `[b, fresh]`, in which order the tokens are taken so that padding comes first in
    every row; None: as they come. `real` and `position` are in that order already.
    ends: False for a part of a prompt of which more is known to come.
    """

    phase: Phase
    fresh: int
    position: int | Tensor
    last: int
    brings: int | Tensor
    real: Tensor | None = None
    order: Tensor | None = None
    ends: bool = True

    @classmethod
    def plain(cls, first: int, fresh: int, phase: Phase | None = None) -> Step:
        """A step without padding; `first` tokens were seen before it."""
        phase = phase or ("decode" if fresh == 1 else "prefill")
        return cls(phase, fresh, first, first + fresh - 1, fresh)

    def part(self, start: int, stop: int) -> Step:
        """Its tokens start..stop-1 alone."""
        if isinstance(self.position, int):
            first = self.position + start
            return replace(
                self,
                fresh=stop - start,
                position=first,
                last=first + stop - start - 1,
                brings=stop - start,
            )
        real = None if self.real is None else self.real[:, start:stop]
        brings = stop - start if real is None else real.sum(1).cpu()
        position = self.position[:, start:stop]
        return replace(self, fresh=stop - start, position=position, brings=brings, real=real)

    def select_rows(self, rows: Tensor) -> Step:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        if isinstance(self.position, int):
            return self
        brings = self.brings
        return replace(
            self,
            position=self.position[rows],
            brings=brings if isinstance(brings, int) else brings[rows.cpu()],
            real=None if self.real is None else self.real[rows],
            order=None if self.order is None else self.order[rows],
        )

    def on(self, device: torch.device) -> Step:
        """The same, its tensors on `device`."""
        if not isinstance(self.position, Tensor) or self.position.device == device:
            return self
        real = None if self.real is None else self.real.to(device)
        order = None if self.order is None else self.order.to(device)
        return replace(self, position=self.position.to(device), real=real, order=order)


def in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """`[b, H, q, d]` with the tokens of each row in the order of int64 `[b, q]`."""
    return tensor.gather(2, order[:, None, :, None].expand_as(tensor))
