"""Metrics of generated text."""

from __future__ import annotations

import pytest

from kvhive.evaluation.text_metrics import (
    exact_match,
    first_number,
    normalise,
    rouge,
    share_found,
    strict_exact_match,
    substring,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Answer, a Thing!", "answer thing"),
        ("another theatre", "another theatre"),
        ("(An) U.S. state\n", "us state"),
        ("the a an", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_substring_ignores_what_normalises_to_nothing():
    assert substring("It was Raymond Unwin, in 1902.", ["raymond unwin"]) == 1
    assert substring("It was somebody else.", ["the", "!", "Unwin"]) == 0


def test_exact_match_forgives_articles_and_its_strict_form_does_not():
    assert exact_match("The lock.", ["a lock", "gate"]) == 1
    assert strict_exact_match("The lock.", ["the lock"]) == 0
    assert strict_exact_match(" LOCK ", ["lock", "gate"]) == 1
    assert strict_exact_match("gate", ["lock", "gate"]) == 0


def test_token_f1_takes_the_best_reference():
    # two of three words right, two of two found: 2 * (2/3 * 1) / (2/3 + 1)
    assert token_f1("old blue boat", ["blue boat", "hive"]) == pytest.approx(0.8)
    assert token_f1("boat boat", ["boat"]) == pytest.approx(2 / 3)
    assert token_f1("", ["boat"]) == 0
    assert token_f1("hive", []) == 0


def test_share_found_counts_each_reference():
    assert share_found("ABC and def", ["abc", "DEF", "ghi", "jkl"]) == 0.5


@pytest.mark.parametrize(
    ("text", "number"), [("about 42, or 43", "42"), ("x7y", "7"), ("none", "")]
)
def test_first_number(text, number):
    assert first_number(text) == number


def test_rouge_is_that_of_the_package_with_stemming():
    scores = rouge("The cats sat. The dog ran.", "the cat sits. the dogs run.")
    assert scores["rouge1"] == pytest.approx(4 / 6)  # the, cat, the, dog
    assert rouge("one two three", "one two three")["rougeL"] == 1
    # Lsum knows sentences: turned round, each still finds its own.
    turned = rouge("The dog ran. The cats sat.", "The cats sat. The dog ran.")
    assert turned["rougeLsum"] == 1
    assert turned["rougeL"] < 1
