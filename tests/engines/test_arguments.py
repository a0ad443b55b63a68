"""Arguments of an engine's command line: read, checked, refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from kvhive.engines.arguments import count, device, known


@pytest.mark.parametrize(("value", "number"), [(1, 1), ("16", 16)])
def test_counts(value: object, number: int) -> None:
    assert count("batch_size", value) == number


@pytest.mark.parametrize("value", ["auto", 0, -1, 1.5, None, ""])
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got"):
        count("batch_size", value)


def test_unknown_names_are_told_with_near_ones() -> None:
    known(["recipe", "dtype"], {"dtype": 1})
    with pytest.raises(ValueError, match="no model argument 'recipes'; did you mean: recipe"):
        known(["recipe", "dtype"], {"recipes": 1})


@pytest.mark.parametrize(
    ("gpu", "asked", "taken"),
    [
        (False, None, "cpu"),
        (False, "cuda:0", "cpu"),
        (False, "mps", "mps"),
        (True, None, "cuda"),
        (True, "cuda:1", "cuda:1"),
        (True, "cpu", "cpu"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, gpu: bool, asked: str | None, taken: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert device(asked) == taken
