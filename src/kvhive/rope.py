"""Rotary positions: turn keys that were written at one position into keys at another.

Attention with rotary embeddings depends on differences of positions only. So when positions are
counted inside the cache, the query stays where it is and each kept key is turned by the distance
that eviction took out from behind it, in float32 from exact angles (`cache/positions.py` says
when).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FINE = 8192  # turns below this come from one table, larger ones from the product of two


@dataclass
class Rotation:
    """A model's rotary embedding: radians a position for each pair of channels, and the pair
    layout.

    frequencies: float64 `[r / 2]`, for the first r of the d key channels. layout: "halves" pairs
    channel i with i + r/2 (Llama and most), "pairs" pairs 2i with 2i + 1 (GPT-J, Cohere, GLM).
    """

    frequencies: Tensor
    layout: Literal["halves", "pairs"] = "halves"
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self.frequencies = self.frequencies.double().cpu()

    def __deepcopy__(self, memo: object) -> Rotation:
        return self  # tables are shared: they are only ever replaced by larger ones

    def __getstate__(self) -> dict[str, Any]:
        return {"frequencies": self.frequencies, "layout": self.layout, "_tables": {}}

    def rotate(self, keys: Tensor, shift: Tensor, most: int) -> Tensor:
        """Keys `[b, K, n, d]` turned by `shift` (int `[b, K, n]`, 0..most); same dtype."""
        return self.turn(keys, *self.cos_sin(shift, most))

    def turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Vectors `[..., d]` turned by these cosines and sines, `[..., r / 2]`; same dtype."""
        half = cos.shape[-1]
        wide = keys.float()
        if self.layout == "halves":
            first, second = wide[..., :half], wide[..., half : 2 * half]
        else:
            first, second = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
        one = torch.addcmul(first * cos, second, sin, value=-1)
        two = torch.addcmul(second * cos, first, sin)
        if self.layout == "halves":
            turned = torch.cat([one, two, wide[..., 2 * half :]], -1)
        else:
            pairs = torch.stack([one, two], -1).flatten(-2)
            turned = torch.cat([pairs, wide[..., 2 * half :]], -1)
        return turned.to(keys.dtype)

    def cos_sin(self, shift: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[..., r / 2]`, of turns by `shift` (int `[...]`, 0..most)."""
        fine, coarse = self._tables_on(shift.device, most // FINE)
        flat, half = shift.reshape(-1), len(self.frequencies)
        near = flat if most < FINE else flat % FINE
        cos, sin = fine.index_select(0, near).view(*shift.shape, -1).split(half, -1)
        if most < FINE:
            return cos, sin
        high = torch.div(flat, FINE, rounding_mode="floor")
        far = coarse.index_select(0, high).view(*shift.shape, -1)
        far_cos, far_sin = far.split(half, -1)
        return cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin

    def ahead(self, start: Tensor, span: int, most: int) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine, as `cos_sin`, over the turns by start .. start + span - 1
        positions.

        Turning by them (`turn`) gives the mean of a vector turned by each. start: int `[...]`,
        0..most.
        """
        angle = torch.arange(span).double()[:, None] * self.frequencies
        cos, sin = self.cos_sin(start, most)
        mean_cos, mean_sin = angle.cos().mean(0).to(cos), angle.sin().mean(0).to(sin)
        return cos * mean_cos - sin * mean_sin, sin * mean_cos + cos * mean_sin

    def _tables_on(self, device: torch.device, most: int) -> tuple[Tensor, Tensor]:
        """Turns by 0..FINE - 1, and by 0, FINE, ..., at least `most` * FINE; each device's own.

        A pair of tables is put in place whole, so that threads and devices do not meet.
        """
        held = self._tables.get(device)
        if held is None or most >= held[1].shape[0]:
            fine = self._table(torch.arange(FINE)) if held is None else held[0]
            coarse = self._table(torch.arange(max(16, 2 * most)) * FINE)
            held = self._tables[device] = fine.to(device), coarse.to(device)
        return held

    def _table(self, positions: Tensor) -> Tensor:
        """float32 `[positions, r]`: cosines, then sines."""
        angle = positions.double()[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1).float()
