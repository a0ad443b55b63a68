"""How the next token is taken: the likeliest, or drawn among the likely ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token; above 0 draws one, 1 by the model's own
    probabilities. top_k: only among so many likeliest tokens. top_p: only among the likeliest that
    make up this share of all probability.

    Raises `ValueError` for values out of range, and for a top_k or top_p that temperature 0 would
    ignore.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0, or from 0.0001 to 100", _is_temperature)
        if self.top_k is not None:
            _check("top_k", self.top_k, "a whole number of at least 1", _is_count)
        if self.top_p is not None:
            _check("top_p", self.top_p, "a number in (0, 1]", _is_share)
        for name, given in (("top_k", self.top_k), ("top_p", self.top_p)):
            if given is not None and not self.temperature:
                raise ValueError(
                    f"{name}={given} needs something drawn, and at temperature 0 nothing is; "
                    "give a temperature too, such as 0.7"
                )

    def pick(self, logits: Tensor) -> int:
        """A token by logits `[vocabulary]`, drawn with torch's own random state."""
        if not self.temperature:
            return int(logits.argmax())
        nothing = torch.empty(1, 0, dtype=torch.int64)  # the tokens before, which no warper reads
        scores: Tensor = self._warpers(nothing, logits[None].float())
        return int(torch.multinomial(scores.softmax(-1), 1))

    @cached_property
    def _warpers(self) -> Callable[[Any, Any], Any]:
        """In the order of `model.generate`."""
        warpers: list[object] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        return LogitsProcessorList(warpers)


def _check(name: str, value: object, wanted: str, fits: Callable[[Any], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not fits(value):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-4 <= value <= 100


def _is_count(value: float) -> bool:
    return isinstance(value, int) and value >= 1


def _is_share(value: float) -> bool:
    return 0 < value <= 1


GREEDY = Sampling()
