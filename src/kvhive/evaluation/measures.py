"""Measures: what is read off a recipe's answers to one item. A value for every probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from kvhive.evaluation import text_metrics
from kvhive.evaluation.types import MeasureInput, Outcome, Probe

Values = Sequence[float | None]  # one for every probe; None where the measure does not apply
Unit = Literal["share", "nats", "perplexity"]


@dataclass(frozen=True)
class Measure:
    """A named number for every probe.

    unit: "share" lies in 0..1, "nats" are natural logarithms, "perplexity" are nats whose mean is
    shown as exp(mean). lower_is_better: as for losses.
    """

    name: str
    values: Callable[[MeasureInput], Values]
    unit: Unit = "share"
    lower_is_better: bool = False


def per_probe(score: Callable[[Probe, Outcome], float | None]) -> Callable[[MeasureInput], Values]:
    """A measure's `values` from a function of one probe and its outcome."""

    def values(given: MeasureInput) -> Values:
        pairs = zip(given.probes, given.outcomes, strict=True)
        return [score(probe, outcome) for probe, outcome in pairs]

    return values


def _mean_hit(probe: Probe, outcome: Outcome) -> float | None:
    return mean(map(float, outcome.hits)) if outcome.hits else None


def _all_hit(probe: Probe, outcome: Outcome) -> float | None:
    return float(all(outcome.hits)) if outcome.hits else None


def _nll(probe: Probe, outcome: Outcome) -> float | None:
    return -mean(outcome.logprobs) if outcome.logprobs else None


def _best(scores: Sequence[float], gold: int) -> float:
    """1 if the gold choice is the best; a tie is shared among the tied, so that no prior means
    chance.
    """
    top = max(scores)
    tied = [place for place, score in enumerate(scores) if score == top]
    return 1 / len(tied) if gold in tied else 0.0


def _margin(scores: Sequence[float], gold: int) -> float:
    return scores[gold] - max(score for place, score in enumerate(scores) if place != gold)


def _choice(probe: Probe, outcome: Outcome) -> float | None:
    return _best(outcome.choices, probe.gold) if outcome.choices else None


def _choice_margin(probe: Probe, outcome: Outcome) -> float | None:
    return _margin(outcome.choices, probe.gold) if outcome.choices else None


def _gains(given: MeasureInput) -> list[list[float]]:
    """For each probe: by how much the context made each choice likelier, in nats."""
    if given.none is None:
        return [[] for _ in given.outcomes]
    return [
        [with_it - without for with_it, without in zip(outcome.choices, floor.choices, strict=True)]
        for outcome, floor in zip(given.outcomes, given.none, strict=True)
    ]


def _over_gains(score: Callable[[Sequence[float], int], float]) -> Callable[[MeasureInput], Values]:
    def values(given: MeasureInput) -> Values:
        pairs = zip(given.probes, _gains(given), strict=True)
        return [score(gains, probe.gold) if gains else None for probe, gains in pairs]

    return values


def centred(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """`scores[question][choice]` minus each choice's mean: what a choice owes to the question
    asked.
    """
    means = [mean(column) for column in zip(*scores, strict=True)]
    return [[score - base for score, base in zip(row, means, strict=True)] for row in scores]


def _centred_choice(given: MeasureInput) -> Values:
    rows = centred([outcome.choices for outcome in given.outcomes])
    return [_best(row, probe.gold) for probe, row in zip(given.probes, rows, strict=True)]


def _generated(score: Callable[[str, Sequence[str]], float]) -> Callable[[MeasureInput], Values]:
    def of_one(probe: Probe, outcome: Outcome) -> float | None:
        if outcome.text is None or not probe.references:
            return None
        return score(outcome.text.strip(), probe.references)

    return per_probe(of_one)


def _rouge(kind: str) -> Callable[[MeasureInput], Values]:
    return _generated(
        lambda text, wanted: max(text_metrics.rouge(text, one)[kind] for one in wanted)
    )


def _against_full(score: Callable[[str, str], float]) -> Callable[[MeasureInput], Values]:
    def values(given: MeasureInput) -> Values:
        pairs = zip(given.outcomes, given.full, strict=True)
        return [
            None if ours.text is None or full.text is None else score(ours.text, full.text)
            for ours, full in pairs
        ]

    return values


def measured(name: str, unit: Unit = "share", lower_is_better: bool = False) -> Measure:
    """The quantity `name` that the task itself put into `Outcome.values`."""
    read = per_probe(lambda _, outcome: outcome.values.get(name))
    return Measure(name, read, unit, lower_is_better)


EXACT = Measure("exact", per_probe(_all_hit))
TOKEN_ACCURACY = Measure("token_accuracy", per_probe(_mean_hit))
NLL = Measure("nll", per_probe(_nll), "nats", lower_is_better=True)
PERPLEXITY = Measure("perplexity", per_probe(_nll), "perplexity", lower_is_better=True)
REFERENCE_NLL = Measure("reference_nll", per_probe(_nll), "nats", lower_is_better=True)
CHOICE = Measure("choice", per_probe(_choice))
MARGIN = Measure("margin", per_probe(_choice_margin), "nats")
PMI_CHOICE = Measure("pmi_choice", _over_gains(_best))
PMI_MARGIN = Measure("pmi_margin", _over_gains(_margin), "nats")
ANSWER_GAIN = Measure("answer_gain", _over_gains(lambda gains, gold: gains[gold]), "nats")
CENTRED_CHOICE = Measure("centred_choice", _centred_choice)
SUBSTRING = Measure("substring", _generated(text_metrics.substring))
EXACT_MATCH = Measure("em", _generated(text_metrics.exact_match))
STRICT_EXACT_MATCH = Measure("strict_em", _generated(text_metrics.strict_exact_match))
F1 = Measure("f1", _generated(text_metrics.token_f1))
SHARE_FOUND = Measure("share_found", _generated(text_metrics.share_found))
ROUGE_1 = Measure("rouge1", _rouge("rouge1"))
ROUGE_2 = Measure("rouge2", _rouge("rouge2"))
ROUGE_L = Measure("rougeL", _rouge("rougeL"))
ROUGE_LSUM = Measure("rougeLsum", _rouge("rougeLsum"))
SAME_AS_FULL = Measure("same_as_full", _against_full(lambda ours, full: float(ours == full)))
ROUGE_TO_FULL = Measure(
    "rougeL_to_full",
    _against_full(lambda ours, full: text_metrics.rouge(ours, full)["rougeL"]),
)
