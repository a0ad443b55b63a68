"""Rotary positions: turn keys that were written at one position into keys at another.

Attention with rotary embeddings depends on differences of positions only. So when positions are
counted inside the cache, the query stays where it is and each kept key is turned by the distance
that eviction took out from behind it. Keys are stored as first written and turned when read, in
float32 from exact angles: nothing ever drifts, however long the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

_FINE = 256  # phase(shift) = coarse[shift // 256] * fine[shift % 256]: two small exact tables


@dataclass
class Rotation:
    """A model's rotary embedding: radians a position for each pair of channels, and the pair layout.

    frequencies: float64 `[r / 2]`, for the first r of the d key channels. layout: "halves" pairs channel
    i with i + r/2 (Llama and most), "pairs" pairs 2i with 2i + 1 (GPT-J, Cohere, GLM).
    """

    frequencies: Tensor
    layout: Literal["halves", "pairs"] = "halves"
    _fine: Tensor = field(init=False, repr=False)
    _coarse: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.frequencies = self.frequencies.double().cpu()
        self._fine = self._phases(torch.arange(_FINE))
        self._coarse = self._phases(torch.arange(64) * _FINE)

    def __deepcopy__(self, memo: object) -> Rotation:
        return self  # tables are shared: they only ever grow

    def rotate(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys `[b, K, n, d]` turned by `shift` (int `[b, K, n]`, >= 0) positions; same dtype."""
        cos, sin = self._cos_sin(shift)
        half = cos.shape[-1]
        if self.layout == "halves":
            first, second = keys[..., :half], keys[..., half : 2 * half]
        else:
            first, second = keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        turned = torch.empty_like(keys, memory_format=torch.contiguous_format)
        one, two = first * cos - second * sin, second * cos + first * sin
        if self.layout == "halves":
            turned[..., :half], turned[..., half : 2 * half] = one, two
        else:
            turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2] = one, two
        turned[..., 2 * half :] = keys[..., 2 * half :]
        return turned

    def _cos_sin(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        if self._fine.device != shift.device:
            self._fine, self._coarse = self._fine.to(shift.device), self._coarse.to(shift.device)
        flat = shift.reshape(-1)
        high = torch.div(flat, _FINE, rounding_mode="floor")
        top = int(high.max()) if flat.numel() else 0
        if top >= self._coarse.shape[0]:
            self._coarse = self._phases(torch.arange(2 * top) * _FINE).to(shift.device)
        phase = self._fine.index_select(0, flat % _FINE) * self._coarse.index_select(0, high)
        phase = phase.view(*shift.shape, -1)
        return phase.real, phase.imag

    def _phases(self, positions: Tensor) -> Tensor:
        angle = positions.double()[:, None] * self.frequencies
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
