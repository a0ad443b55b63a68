"""Budget: counts and shares, as numbers and as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhive.budget import FLOOR, Budget


@pytest.mark.parametrize(
    ("value", "tokens", "share"),
    [
        (1024, 1024, None),
        (1, 1, None),
        ("1024", 1024, None),
        (" 7 ", 7, None),
        (0.4, None, 0.4),
        ("0.4", None, 0.4),
        ("40%", None, 0.4),
        ("12.5 %", None, 0.125),
        (1.0, None, 1.0),
        ("1.0", None, 1.0),
        ("100%", None, 1.0),
        ("1e-2", None, 0.01),
        (".5", None, 0.5),
    ],
)
def test_counts_and_shares(
    value: int | float | str, tokens: int | None, share: float | None
) -> None:
    budget = Budget.of(value)
    assert (budget.tokens, budget.share) == (tokens, share)
    assert Budget.of(budget) is budget


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, "at least 1, got 0"),
        (-3, "at least 1, got -3"),
        ("0", "at least 1, got 0"),
        ("-3", "at least 1, got -3"),
        (1.5, r"must lie in \(0, 1\], got 1.5"),
        ("1.5", "without a decimal point"),
        ("1024.0", "without a decimal point"),
        (0.0, r"\(0, 1\]"),
        ("-0.1", r"\(0, 1\]"),
        ("0%", r"\(0, 1\]"),
        ("140%", r"\(0, 1\]"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        ("nan", "got nan"),
        ("", "neither a number"),
        ("many", "neither a number"),
        ("40 percent", "neither a number"),
        ("0.4x", "neither a number"),
        ("½", "neither a number"),
        ("²", "neither a number"),
        ("5@6", "neither a number"),
    ],
)
def test_what_makes_no_budget_is_refused(value: int | float | str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^budget: .*{reason}"):
        Budget.of(value)


@pytest.mark.parametrize("value", [None, True, False, [1], (0.4,), {}, b"1", 1j])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="expected a number of tokens or a share"):
        Budget.of.__wrapped__(Budget, value) if hasattr(Budget.of, "__wrapped__") else Budget.of(
            value
        )


def test_it_is_one_of_the_two() -> None:
    for arguments in ({}, {"tokens": 3, "share": 0.5}):
        with pytest.raises(ValueError, match="exactly one of tokens= and share="):
            Budget(**arguments)


@given(share=st.floats(min_value=0.0, max_value=1.0, exclude_min=True))
def test_a_share_survives_its_printing(share: float) -> None:
    assert Budget.of(str(Budget(share=share))) == Budget(share=share)


@given(tokens=st.integers(1, 2**31 - 1))
def test_a_count_survives_its_printing(tokens: int) -> None:
    assert Budget.of(str(Budget(tokens=tokens))) == Budget(tokens=tokens)


@given(
    share=st.floats(min_value=0.001, max_value=1.0),
    seen=st.integers(0, 100_000),
    least=st.integers(1, 200),
)
def test_a_share_has_a_floor(share: float, seen: int, least: int) -> None:
    allowed = Budget(share=share).resolve(seen, least)
    assert allowed >= FLOOR == 65
    assert allowed >= least
    assert allowed >= share * seen - 0.5
    assert allowed <= max(FLOOR, least, share * seen + 0.5)


def test_a_count_is_taken_as_it_is() -> None:
    assert Budget(tokens=3).resolve(1_000, 50) == 3
