"""Repetition: what a text is worth to a model that says it again (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvhive.kernels import Ask, Observed, peaks
from kvhive.policies._parts.selection import sinks
from kvhive.slots import Slots
from kvhive.step import Step


def score_repeated(
    scores: Tensor, slots: Slots, seen: Observed, repeated: Tensor, sink: int
) -> None:
    """Score the slots that a chunk of the pass repeats, in place; the others keep their scores.

    scores: float `[b, K, n]`. A slot's score is the largest attention that any query of the
    chunk's pass, and of the query heads of the group, gives it, as if nothing were held but the
    slots repeated, the first `sink` ones and the pass itself.
    """
    own = torch.arange(slots.length, device=slots.device) >= slots.length - seen.fresh
    among = (repeated | own | sinks(slots, sink)) & slots.valid
    scores.copy_(torch.where(repeated, most_attention(slots, seen, among), scores))


def most_attention(slots: Slots, seen: Observed, among: Tensor) -> Tensor:
    """float32 `[b, K, n]`: the largest attention that any query of the step gives each slot, as if
    slots `among` (bool `[b, K, n]`, the step's own tokens included) were all that is held; 0 for
    the others.
    """
    assert seen.queries is not None and seen.keys is not None
    used = among.any(0).any(0).nonzero()[:, 0]
    real = slots.valid[:, 0, slots.length - seen.fresh :] if slots.holes else None
    step = replace(Step.plain(0, seen.fresh, "verify"), real=real)
    valid = among[:, :, used]
    ask = Ask(step, seen.scale, valid=None if bool(valid.all()) else valid)
    top = peaks(seen.queries, seen.keys[:, :, used], ask)
    return torch.zeros_like(among, dtype=torch.float32).index_copy_(-1, used, top)
