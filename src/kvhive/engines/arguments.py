"""Arguments as an engine's command line hands them over: read, checked, refused in one sentence."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from kvhive.registry import did_you_mean


def known(names: Collection[str], given: Collection[str]) -> None:
    """Raises `ValueError` for a name given that is not among those known."""
    for name in given:
        if name not in names:
            hint = did_you_mean(name, list(names))
            raise ValueError(f"kvhive has no model argument {name!r}; {hint}")


def count(name: str, value: Any) -> int:
    """A whole number of at least 1. Raises `ValueError` for anything else."""
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"kvhive: {name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def device(asked: str | None) -> str:
    """The GPU if there is one and nothing else was asked for, else the CPU.

    lm-evaluation-harness asks for "cuda:0" where nobody chose a device.
    """
    if torch.cuda.is_available():
        return asked or "cuda"
    return "cpu" if asked is None or asked.startswith("cuda") else asked
