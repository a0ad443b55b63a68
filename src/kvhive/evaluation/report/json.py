"""A run as JSON: every score, the leaderboard, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from kvhive.evaluation.report.run import Run
from kvhive.evaluation.statistics import Score, Standing


def as_json(run: Run) -> str:
    """One object. Figures are {value, low, high}, null where they mean nothing; low and high are
    null where there are too few items for an interval.
    """
    found = {
        "run": run.name,
        "settings": dict(run.settings),
        "facts": dict(run.facts),
        "complete": not run.missing,
        "missing": [asdict(one) for one in run.missing],
        "unclear": run.unclear(),
        "leaderboard": [_standing(one) for one in run.standings] if run.ranked else None,
        "scores": [_score(one) for one in run.scores],
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _score(score: Score) -> dict[str, Any]:
    measure = score.measure
    described = {
        "measure": measure.name,
        "unit": measure.unit,
        "lower_is_better": measure.lower_is_better,
    }
    values = {name: value for name, value in vars(score).items() if name != "measure"}
    figures = {
        name: None if values[name] is None else asdict(values[name])
        for name in ("score", "difference", "ratio", "skill")
    }
    return {**values, **described, **figures}


def _standing(standing: Standing) -> dict[str, Any]:
    return asdict(standing)
