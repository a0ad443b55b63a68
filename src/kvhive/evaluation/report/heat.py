"""Scores by length and depth, for tasks whose items say where their needle lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from kvhive.evaluation.statistics import Row
from kvhive.html.heat import HeatCell

Place = tuple[float, float]  # length, depth


@dataclass(frozen=True)
class Heat:
    """A recipe's scores: a column for every length, a row of cells for every depth."""

    recipe: str
    lengths: list[str]
    rows: list[tuple[str, list[HeatCell | None]]]


def heat_maps(rows: Iterable[Row], measure: str) -> list[Heat]:
    """One for every recipe, all on one scale; none where no item has a length and a depth."""
    grids: dict[str, dict[Place, list[float]]] = {}
    for row in rows:
        for probe in row["probes"]:
            facts = {**row["facts"], **probe["facts"]}
            if measure in probe["scores"] and {"length", "depth"} <= facts.keys():
                place = (float(facts["length"]), float(facts["depth"]))
                found = grids.setdefault(row["recipe"], {}).setdefault(place, [])
                found.append(probe["scores"][measure])
    means = {
        recipe: {place: mean(found) for place, found in grid.items()}
        for recipe, grid in grids.items()
    }
    values = [value for grid in means.values() for value in grid.values()]
    return [_heat(recipe, grid, values) for recipe, grid in means.items()]


def _heat(recipe: str, grid: dict[Place, float], all_values: Sequence[float]) -> Heat:
    lengths = sorted({length for length, _ in grid})
    depths = sorted({depth for _, depth in grid})
    low, high = min(all_values), max(all_values)
    rows = [
        (f"{depth:.0%}", [_cell(grid.get((length, depth)), low, high) for length in lengths])
        for depth in depths
    ]
    return Heat(recipe, [f"{length:g}" for length in lengths], rows)


def _cell(value: float | None, low: float, high: float) -> HeatCell | None:
    if value is None:
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    return HeatCell.of(f"{value:.2f}", share)
