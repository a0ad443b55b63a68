"""The released code of Scissorhands: settings and sizes; for its rule see `_parts`, endorsement."""

from __future__ import annotations

from typing import Any

import pytest

from kvhive.policies.scissorhands_percentile import ScissorhandsPercentile
from kvhive.recipe import Recipe


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"history": 0}, "history must be at least 1, got 0"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"start": -3}, "start must be at least 0, got -3"),
        ({"keep_fraction": 1.0}, r"keep_fraction must lie in \(0, 1\), got 1.0"),
        ({"keep_fraction": 0.0}, r"keep_fraction must lie in \(0, 1\), got 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With the name of the knob, its value and the rule."""
    with pytest.raises(ValueError, match=f"^scissorhands_percentile: {message}"):
        ScissorhandsPercentile(**knobs)


@pytest.mark.parametrize("knob", ["drop=3", "threshold=cache"])
def test_settings_of_the_papers_policy_are_refused(knob: str) -> None:
    """They are for policy `scissorhands` only."""
    message = f"^scissorhands_percentile has no knob '{knob.split('=')[0]}'"
    with pytest.raises(ValueError, match=message):
        Recipe.parse(f"scissorhands_percentile({knob})")


@pytest.mark.usefixtures("unchecked")
def test_a_word_that_is_no_choice_is_refused() -> None:
    """By the knob's own check, or before it by the type checks of the test run."""
    knobs: dict[str, Any] = {"decode": "nonesuch"}
    with pytest.raises((ValueError, TypeError), match="decode"):
        ScissorhandsPercentile(**knobs)


def test_the_released_code_needs_no_budget() -> None:
    """With one, there must be room beside the recent tokens."""
    assert Recipe.parse("scissorhands_percentile").budget is None
    assert str(Recipe.parse("scissorhands_percentile(recent=8)@9").budget) == "9"
    with pytest.raises(ValueError, match="a budget of 8 is below 9"):
        Recipe.parse("scissorhands_percentile(recent=8)@8")


def test_it_sizes_itself_from_its_start_on() -> None:
    """Before it nothing goes; then it is asked after every step, and decides how many stay."""
    alone = ScissorhandsPercentile(start=20).sizing.alone
    assert alone is not None
    assert [alone(seen) for seen in (0, 1, 19, 20, 1000)] == [0, 1, 19, 0, 0]
