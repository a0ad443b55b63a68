"""How far next-token distributions are from the full cache's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvhive.comparison.result import Fidelity

Distance = tuple[float, bool]  # KL divergence in nats; whether the likeliest token agrees


def distance(full: Tensor, other: Tensor) -> Distance:
    """Between two next-token distributions, from their logits `[vocabulary]`: KL(full || other)."""
    expected = full.float().log_softmax(-1)
    given = other.float().log_softmax(-1)
    kl = float((expected.exp() * (expected - given)).sum())
    return kl, bool(expected.argmax() == given.argmax())


def mean(distances: Sequence[Distance]) -> Fidelity | None:
    """Over answer tokens; None where nothing was measured."""
    if not distances:
        return None
    count = len(distances)
    return Fidelity(
        kl=sum(kl for kl, _ in distances) / count,
        top1=sum(agrees for _, agrees in distances) / count,
        positions=count,
    )
