"""What ZigZagKV learns: how many tokens each head needs to hold most of its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.allocations.zigzag import METHOD, SHAPES, lmba
from kvhive.calibration import Profile
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.learning.picture import Picture
from kvhive.learning.watching import Attention, watch
from kvhive.spec import knob

_SLACK = 1e-12  # of the mass: a sum that rounding left just below it has reached it


@CALIBRATIONS.register(METHOD)
@dataclass(frozen=True)
class ZigZag(Calibration):
    """Count, for every query head, the fewest past tokens that hold a share of the attention of the
    last `window` queries; as a share of the past, averaged over the pieces.

    Tensors: `tau`, float64 `[T]`; `share`, float32 `[T, layers, query heads]`, of the compressed
    layers, in (0, 1].

    Source: arXiv:2412.09036, section 4 (MBA).
    """

    source: ClassVar[str] = "arXiv:2412.09036"

    tokens: int = knob(2048, "length of a piece, in tokens", least=64)
    window: int = knob(32, "last queries, whose attention is counted", least=1)
    tau: tuple[float, ...] = knob(
        (0.8, 0.9, 0.95), "shares of the attention to hold", least=0.01, most=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window >= self.tokens:
            raise ValueError(
                f"zigzag: window must be below the {self.tokens} tokens of a piece, got "
                f"{self.window}"
            )

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """See the base."""
        for place, ids in enumerate(texts):
            if kept.get(str(place)) is None:
                tick(place / len(texts))
                kept.put(str(place), {"share": self._shares(model, ids)})
        tick(1.0)
        read = [kept.parts[str(place)]["share"] for place in range(len(texts))]
        share = torch.stack(read).double().mean(0).float()
        return {"tau": torch.tensor(self.tau, dtype=torch.float64), "share": share}

    @classmethod
    def pictures(cls, profile: Profile) -> tuple[Picture, ...]:
        """The need of every layer, for each tau."""
        profile.check_tensors(SHAPES)
        taus = profile.tensors["tau"].tolist()
        meaning = "share of the past tokens that a layer needs to hold tau of its attention"
        values = torch.stack([lmba(profile, tau) for tau in taus], 1)
        return (Picture(meaning, tuple(f"tau {tau:g}" for tau in taus), values, ".1%"),)

    def _shares(self, model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
        """float64 `[T, layers, H]` of one piece."""
        layers: list[Tensor] = []

        def see(one: Attention) -> None:
            past = window_attention(one.queries, one.keys, self.window, one.scale)
            counts = torch.stack([mba(past, tau) for tau in self.tau])
            layers.append(counts.cpu().double() / past.shape[-1])

        watch(model, ids, see)
        return torch.stack(layers, 1)


def window_attention(queries: Tensor, keys: Tensor, window: int, scale: float) -> Tensor:
    """Mean attention of the last `window` queries on each token before them, softmax over all they
    see: `[H, n, d]`, `[K, n, d]` -> float32 `[H, n - window]` (float64 for float64).
    """
    n = queries.shape[1]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    last = queries[:, n - window :].to(dtype) * scale
    by_group = last.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)  # [K, G * window, d]
    logits = (by_group @ keys.to(dtype).transpose(1, 2)).view(-1, window, n)
    later = torch.ones(window, n, dtype=torch.bool, device=keys.device).triu(n - window + 1)
    weights: Tensor = logits.masked_fill(later, float("-inf")).softmax(-1)
    return weights[..., : n - window].mean(1)


def mba(past: Tensor, tau: float) -> Tensor:
    """int64 `[...]`: the fewest entries of each row that hold `tau` of its sum, counted from the
    largest; of float `[..., m]`, not negative. Minimum budget size to hold most attention.
    """
    held: Tensor = past.double().sort(-1, descending=True).values.cumsum(-1)
    wanted = held[..., -1:] * tau * (1 - _SLACK)
    short: Tensor = (held < wanted).sum(-1)
    return (short + 1).clamp_max(past.shape[-1])
