"""One recipe's run, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.cache.report import Report
from kvhive.comparison.survivors import Survivors


@dataclass(frozen=True)
class Fidelity:
    """Next-token distributions against the full cache's, on the full cache's own answers.

    kl: mean of KL(full || recipe) over `positions` answer tokens, in nats. top1: share of them at
    which both put the same token first.
    """

    kl: float
    top1: float
    positions: int


@dataclass(frozen=True)
class Answer:
    """One question and the answer to it. tokens: its ids, the end of the turn included."""

    question: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """One recipe's run.

    reference: whether this is the full cache the others are compared with. report, survivors: the
    cache after it has read the document (`mode="aware"`: and the first question). prefill_seconds:
    time to read that, compression included. decode_rate: tokens a second, from the median answer
    token; None when no answer has two. fidelity: None when the document is too long for a full
    cache to compare with.
    """

    recipe: str
    reference: bool
    answers: tuple[Answer, ...]
    report: Report
    survivors: Survivors
    prefill_seconds: float
    decode_rate: float | None
    fidelity: Fidelity | None
