"""BaKlaVa: heads that change what they are given get more, by a profile of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvhive.allocations._importance import combined, of_kv_heads, proportional, tiers
from kvhive.allocations.base import ALLOCATIONS, Allocation, Facts
from kvhive.calibration import Profile
from kvhive.spec import knob

METHOD = "baklava"
SHAPES = {  # what a profile holds; T texts, L compressed layers, H query heads, P x S choices tried
    "heads": "T L H",  # importance of query heads: 1 - cosine of value and head output
    "layers": "T L",  # of layers: 1 - cosine of the hidden state before attention and after it
    "kv_heads": "1",  # of each layer
    "parts": "P",  # tried as `low_frac`
    "scales": "S",  # tried as `low_scale`
    "losses": "P S",  # nats a token of the validation text
    "uniform": "1",  # the loss of the uniform plan, and of that in proportion, for comparison
    "proportional": "1",
    "choice": "2",  # the best `low_frac` and `low_scale`
}


@ALLOCATIONS.register(METHOD)
@dataclass(frozen=True)
class Baklava(Allocation):
    """Share out by how much each KV head changes what it is given, learnt once for a model.

    A head whose output is the value of the token itself needs no cache; one whose output differs
    does. With `tiers` the least important heads get a part of the mean, and the others share the
    rest alike; `searched` is that with the choice that read a validation text best when the profile
    was made; `proportional` shares in proportion to importance. No head gets less than the policy
    needs or `floor`, unless the budget is less, nor, where the row has read more than the budget,
    more than the row has read. The total is exact.

    Source: Gulhan et al. 2025, arXiv:2502.13176; there is no code by the authors.
    """

    source: ClassVar[str] = "arXiv:2502.13176"
    calibration: ClassVar[str | None] = METHOD

    allocation: Literal["searched", "tiers", "proportional"] = knob(
        "searched", "the plan that a search chose, tiers of one's own, or in proportion"
    )
    low_frac: float = knob(0.5, "tiers: part of the KV heads that get less", least=0, most=1)
    low_scale: float = knob(0.5, "tiers: what they get, as a part of the mean", least=0, most=1)
    floor: int = knob(8, "least tokens of a head", least=1)
    group: Literal["mean", "max"] = knob(
        "mean", "importance of a KV head: mean or max of its query heads"
    )
    use_layer: bool = knob(True, "weigh heads by the importance of their layer too")
    profile: str | None = knob(None, "file of the profile; none: one that comes with kvhive")

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """See the base."""
        profile.check_tensors(SHAPES)
        for name, most in (("heads", 2), ("layers", 2), ("choice", 1)):
            profile.check_range(name, 0, most)
        held = profile.tensors["heads"].shape[1], int(profile.tensors["kv_heads"])
        if held != (layers, kv_heads) or profile.tensors["heads"].shape[2] % kv_heads:
            raise ValueError(
                f"this profile is of {held[0]} layers with {held[1]} KV heads, not of {layers} "
                f"compressed layers with {kv_heads}; make one for this model"
            )

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """See the base."""
        assert facts.profile is not None
        importance = self.importance(facts.profile)
        places = range(facts.layers) if facts.places is None else facts.places
        here, total = importance[list(places)], budget * facts.layers * facts.kv_heads
        least = max(floor, min(self.floor, budget))
        most = facts.seen if facts.seen > budget else None
        if self.allocation == "proportional":
            return proportional(here, total, least, most)
        chosen: tuple[float, float] = self.low_frac, self.low_scale
        if self.allocation == "searched":
            part, scale = facts.profile.tensors["choice"].tolist()
            chosen = part, scale
        return tiers(here, total, least, most, *chosen)

    def importance(self, profile: Profile) -> Tensor:
        """float64 `[layers, K]`: of every KV head of the model, with mean about 1."""
        heads, count = profile.tensors["heads"], int(profile.tensors["kv_heads"])
        kv = of_kv_heads(heads, count, self.group).mean(0)
        layers = profile.tensors["layers"].double().mean(0)
        return combined(kv, layers if self.use_layer else None)
