"""KeyDiff: keep the keys that differ most from the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kvhive.kernels import Held, Needs
from kvhive.policies.base import POLICIES, Policy
from kvhive.slots import Slots
from kvhive.spec import knob


@POLICIES.register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the most distinctive keys: those with the lowest cosine similarity to the mean key held.

    Keys as attention reads them (rotated), each KV head by itself; no attention is looked at, so
    the choice knows nothing of the question. Ties: the older token.

    Source: Park et al. 2025, arXiv:2504.15364; `KeyDiffPress` of kvpress. State: none, the
    score is worked out anew at each eviction because the mean moves.
    """

    source: ClassVar[str] = "arXiv:2504.15364"
    cost: ClassVar[str] = "reads the keys once an eviction, no attention scores"

    anchor: Literal["unit", "plain"] = knob(
        "unit", "mean of the keys scaled to length 1, or of the keys as they are"
    )

    @property
    def needs(self) -> Needs:
        """The keys, when something must go."""
        return Needs(score_keys=True)

    def score(self, slots: Slots, held: Held) -> Tensor:
        """How little every key is like the mean of all that are held."""
        keys = held.keys.float()
        unit = F.normalize(keys, dim=-1)
        averaged = unit if self.anchor == "unit" else keys
        # The sum points where the mean does, and only its direction matters.
        anchor = (averaged * slots.valid[..., None]).sum(2)
        return -(unit @ F.normalize(anchor, dim=-1)[..., None]).squeeze(-1)
