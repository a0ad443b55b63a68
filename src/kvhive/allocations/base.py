"""What an allocation is: it spreads the total budget over layers and KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvhive.calibration import Profile
from kvhive.registry import Registry
from kvhive.spec import Spec


@dataclass(frozen=True)
class Facts:
    """What an allocation knows of a row when it shares out.

    layers: those that are compressed and limited. kv_heads: in each of them. seen: real tokens that
    the row has seen. profile: of the model, where the allocation asks for one. places: which of all
    compressed layers are limited; None: the first.
    """

    layers: int
    kv_heads: int
    seen: int
    profile: Profile | None = None
    places: tuple[int, ...] | None = None

    def even(self, budget: int) -> Tensor:
        """int64 `[layers, kv_heads]`: `budget` for every head."""
        return torch.full((self.layers, self.kv_heads), budget)


@dataclass(frozen=True)
class Allocation(Spec):
    """Base of all allocations. Fields are hyper-parameters.

    Class facts: `source` (paper), `compete` (who shares anew at each eviction, by the scores tokens
    have then: nobody, "none": the shares are fixed; the heads of a "layer"; or all heads of the
    "model", which then evicts when its last layer has attended), `calibration` (the method whose
    profile it reads; None for no profile).
    """

    source: ClassVar[str] = ""
    compete: ClassVar[Literal["none", "layer", "model"]] = "none"
    calibration: ClassVar[str | None] = None

    def check(self, layers: int) -> None:
        """Raises `ValueError` for knobs that do not suit so many compressed layers."""

    @property
    def profile_file(self) -> str | None:
        """The file of the profile, where a knob called `profile` names one."""
        file: str | None = getattr(self, "profile", None)
        return file

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """Raises `ValueError` for a profile without what it reads, or of a model of other sizes:
        compressed layers, and KV heads in each of them.
        """

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """int64 `[layers, kv_heads]` on the CPU, with sum exactly `budget * layers * kv_heads`.

        floor: the least any head needs, which is at most `budget`.
        """
        raise TypeError(f"{type(self).__name__} does not spread a budget")

    def at_eviction(
        self, scores: Sequence[Tensor], limits: Sequence[Tensor], floor: int
    ) -> list[Tensor]:
        """Shares among heads that compete: int64 `[b, K]` for each layer, on its device.

        scores: float32 `[b, K, n]` for each layer that competes, infinity for tokens that stay in
        any case, minus infinity for empty slots. limits: int64 `[b, K]`, what `shares` gave, whose
        sum over all heads of a row must be kept. Rows are judged independently.
        """
        raise TypeError(f"{type(self).__name__} does not share by scores")


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
