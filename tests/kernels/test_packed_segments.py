"""Cutting rows into segments of one form for keys and one for values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhive.kernels.packed_segments import ExactRows, cut


def part(lengths: list[int]) -> ExactRows:
    """Rows of so many tokens, with no numbers."""
    counts = torch.tensor(lengths)
    return ExactRows(torch.empty(0, 8), torch.zeros_like(counts), counts)


def some(rows: int) -> st.SearchStrategy[list[list[int]]]:
    """Tokens of each row in each of one to three parts."""
    return st.lists(
        st.lists(st.integers(0, 4), min_size=rows, max_size=rows), min_size=1, max_size=3
    )


def forms(parts: list[ExactRows], row: int) -> list[tuple[int, int]]:
    """Of each token of a row, its part and its place there."""
    return [
        (number, place) for number, one in enumerate(parts) for place in range(one.lengths[row])
    ]


@given(data=st.data(), rows=st.integers(1, 3))
def test_every_token_is_in_one_segment_in_order(data: st.DataObject, rows: int) -> None:
    """Against lists: the form of each token's key, and of its value."""
    drawn = data.draw(some(rows)), data.draw(some(rows))
    totals = [torch.tensor(lengths).sum(0) for lengths in drawn]
    rest = totals[0] - totals[1]
    keys = [part(lengths) for lengths in [*drawn[0], (-rest).clamp_min(0).tolist()]]
    values = [part(lengths) for lengths in [*drawn[1], rest.clamp_min(0).tolist()]]
    at = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)))
    segments = cut(keys, values, at)
    for row in range(rows):
        found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        place = int(at[row])
        for one in segments:
            length = int(one.lengths[row])
            assert not length or int(one.at[row]) == place
            place += length
            for side, parts, rows_of, first in (
                (found[0], keys, one.keys, one.key_first),
                (found[1], values, one.values, one.value_first),
            ):
                number = next(n for n, each in enumerate(parts) if each is rows_of)
                side += [(number, int(first[row]) + token) for token in range(length)]
        assert found == (forms(keys, row), forms(values, row))


def test_parts_that_no_row_has_give_no_segment() -> None:
    keys = [part([2, 0]), part([0, 0]), part([3, 1])]
    assert len(cut(keys, keys, torch.zeros(2, dtype=torch.int64))) == 2
    assert cut([part([0, 0])], [part([0, 0])], torch.zeros(2, dtype=torch.int64)) == []


def test_rows_of_fewer_values_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"as many tokens a row as keys, \[2, 3\], got \[2, 1\]"):
        cut([part([2, 3])], [part([2, 1])], torch.zeros(2, dtype=torch.int64))


def test_width_is_that_of_the_numbers() -> None:
    assert part([1]).width == 8
