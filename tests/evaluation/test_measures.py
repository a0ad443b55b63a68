"""Measures read off outcomes."""

from __future__ import annotations

import pytest

from kvhive.evaluation import measures
from kvhive.evaluation.measures import Measure
from kvhive.evaluation.types import Item, MeasureInput, Outcome, Probe


def values(measure: Measure, outcomes, probes=None, none=None, full=None):
    probes = probes or [Probe("?", gold=1, references=("yes",)) for _ in outcomes]
    item = Item("i", "", "", tuple(probes))
    full = tuple(full or outcomes)
    none = None if none is None else tuple(none)
    return list(measure.values(MeasureInput(item, tuple(outcomes), full, none)))


def test_exact_needs_every_token_and_accuracy_counts_them():
    outcomes = [Outcome(hits=(True, True)), Outcome(hits=(True, False)), Outcome()]
    assert values(measures.EXACT, outcomes) == [1, 0, None]
    assert values(measures.TOKEN_ACCURACY, outcomes) == [1, 0.5, None]


def test_loss_is_the_mean_of_the_tokens():
    assert values(measures.NLL, [Outcome(logprobs=(-1.0, -3.0))]) == [2.0]


def test_choice_takes_the_likeliest():
    outcomes = [Outcome(choices=(-3.0, -1.0, -2.0)), Outcome(choices=(-1.0, -3.0, -2.0))]
    assert values(measures.CHOICE, outcomes) == [1, 0]
    assert values(measures.MARGIN, outcomes) == [1.0, -2.0]


def test_pmi_takes_what_the_context_adds():
    """The gold choice is unlikely in itself, but the context raises it most."""
    with_it, without = Outcome(choices=(-1.0, -5.0)), Outcome(choices=(-1.5, -9.0))
    assert values(measures.CHOICE, [with_it]) == [0]
    assert values(measures.PMI_CHOICE, [with_it], none=[without]) == [1]
    assert values(measures.ANSWER_GAIN, [with_it], none=[without]) == [4.0]
    assert values(measures.PMI_MARGIN, [with_it], none=[without]) == [3.5]


def test_without_context_pmi_is_chance():
    outcome = Outcome(choices=(-1.0, -5.0, -2.0, -9.0))
    assert values(measures.PMI_CHOICE, [outcome], none=[outcome]) == [0.25]


def test_centred_choice_takes_what_the_question_adds():
    """Choice 0 is likeliest for both questions; only minus its mean do the questions show."""
    probes = [Probe("a", gold=0), Probe("b", gold=1)]
    outcomes = [Outcome(choices=(-1.0, -4.0)), Outcome(choices=(-1.5, -2.0))]
    assert values(measures.CHOICE, outcomes, probes) == [1, 0]
    assert values(measures.CENTRED_CHOICE, outcomes, probes) == [1, 1]
    assert measures.centred([[1.0, 2.0], [3.0, 6.0]]) == [[-1, -2], [1, 2]]


def test_text_measures_strip_leading_lines():
    assert values(measures.SUBSTRING, [Outcome(text="\n\nYes, it is")]) == [1]
    assert values(measures.EXACT_MATCH, [Outcome(text="yes."), Outcome()]) == [1, None]


def test_agreement_with_the_full_cache():
    outcomes, full = [Outcome(text="a b c"), Outcome(text="a b d")], [Outcome(text="a b c")] * 2
    assert values(measures.SAME_AS_FULL, outcomes, full=full) == [1, 0]
    got = values(measures.ROUGE_TO_FULL, outcomes, full=full)
    assert got == pytest.approx([1, 2 / 3])


def test_a_modes_first_probes_only():
    item = Item("i", "", "", (Probe("a", gold=0), Probe("b", gold=1)))
    answers = MeasureInput(item, (Outcome(choices=(-1.0, -2.0)),), (), None)
    assert list(measures.CHOICE.values(answers)) == [1]
