"""Every recorded case, replayed. `--vectors DIR` replays those below DIR instead of our copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import Case, find_cases, labels
from .methods import REPLAYS

OWN = Path(__file__).parents[1] / "vectors"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case, named `method/case`."""
    if "case" not in metafunc.fixturenames:
        return
    try:
        cases = find_cases(Path(metafunc.config.getoption("vectors") or OWN))
    except ValueError as error:
        raise pytest.UsageError(f"--vectors: {error}") from None
    metafunc.parametrize("case", cases, ids=labels(cases))


def test_replay(case: Case) -> None:
    """The library decides as was recorded."""
    replay = REPLAYS.get(case.method)
    if replay is None:
        pytest.skip(f"unsupported: {case.method} has no replay")
    replay(case)
