"""From rows to figures: means, ratios to the full cache, paired bootstrap intervals, floors.

Items that belong together (one question in three places) are drawn together; the draws are the same
for every recipe of a task, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from kvhive.evaluation.measures import Measure
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.tasks import parse_task

DRAWS = 2000
LEVEL = 0.95
LEAST = 1e-9  # denominators below count as nothing
ENOUGH = 5  # items (clusters) that an interval or a verdict takes at least
CLEAR = 4.0  # standard errors between the full cache and the floor of a task that can show a loss
FULL = "full"

Row = dict[str, Any]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; low and high are None where there are too few items for one
    (`ENOUGH`).
    """

    value: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half of its width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """low and high; the value itself where there is no interval."""
        low, high = self.low, self.high
        return (self.value, self.value) if low is None or high is None else (low, high)


@dataclass(frozen=True)
class Score:
    """One measure of one recipe on one task in one mode.

    score: as shown (perplexity is exp of the mean loss). against: the recipe it is compared with,
    the full cache unless another was asked for. difference: minus that one's score, paired. ratio:
    score / its score, or the inverse where lower is better, so that 1 is no loss; None where a
    ratio means nothing. full, floor: the scores with the full cache and with no context. skill:
    (score - floor) / (full - floor), 1 like the full cache, 0 like no context; None without a
    floor. items: how many; clusters: how many of them are drawn apart; clear: whether the full
    cache is at least 4 standard errors better than the floor, of enough items.
    """

    task: str
    mode: str
    recipe: str
    measure: Measure
    items: int
    clusters: int
    score: Interval
    against: str
    full: float
    floor: float | None
    difference: Interval
    ratio: Interval | None
    skill: Interval | None
    clear: bool
    kept: float
    seen: float
    nbytes: float
    full_bytes: float


@dataclass(frozen=True)
class Sample:
    """Values of one measure, item by item, and the cluster of each. Same items for every recipe."""

    values: Mapping[str, Numbers]
    clusters: npt.NDArray[np.int64]
    seed: int = 0
    _means: dict[str, Numbers] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Clusters."""
        return int(self.clusters.max()) + 1

    def means(self, recipe: str) -> Numbers:
        """The mean, first of all items, then of each bootstrap draw: `[1 + DRAWS]`."""
        if recipe not in self._means:
            self._means[recipe] = self._drawn(self.values[recipe], self.count)
        return self._means[recipe]

    def _drawn(self, values: Numbers, count: int) -> Numbers:
        sums = np.bincount(self.clusters, weights=values, minlength=count)
        sizes = np.bincount(self.clusters, minlength=count).astype(np.float64)
        drawn = draws(count, self.seed)
        means = sums[drawn].sum(1) / sizes[drawn].sum(1)
        return np.concatenate([[values.mean()], means])

    def standard_error(self, values: Numbers) -> float:
        """Of the mean of `values`, clusters counting as one observation each."""
        count = self.count
        if count < 2:
            return float("inf")
        sizes = np.bincount(self.clusters, minlength=count)
        each = np.bincount(self.clusters, weights=values, minlength=count) / sizes
        return float(each.std(ddof=1) / np.sqrt(count))


@lru_cache(maxsize=64)
def draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    """`[DRAWS, count]`: which of `count` clusters each bootstrap draw holds."""
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def interval(values: Numbers, count: int) -> Interval:
    """From a value followed by its bootstrap draws of `count` clusters; without bounds where those
    are fewer than `ENOUGH`.
    """
    if count < ENOUGH:
        return Interval(float(values[0]), None, None)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    return Interval(float(values[0]), float(low), float(high))


def scores(rows: Sequence[Row], against: str = FULL) -> list[Score]:
    """All figures of a run, in the order of its rows; differences and ratios to recipe
    `against`.
    """
    parts = _by_task(rows).items()
    return [score for key, part in parts for score in _scores_of(*key, part, against)]


def _scores_of(task: str, mode: str, rows: Sequence[Row], against: str) -> Iterable[Score]:
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    for measure in parse_task(task).measures:
        sample = sample_of(rows, measure.name)
        if sample is None or not {FULL, against} <= sample.values.keys():
            continue
        for recipe in recipes:
            if recipe in sample.values:
                held = [row for row in rows if row["recipe"] == recipe]
                yield _score(task, mode, recipe, measure, sample, held, against)


def sample_of(rows: Sequence[Row], measure: str) -> Sample | None:
    """A measure's values on the items for which every recipe that has any has one."""
    by_item: dict[str, dict[str, float]] = {}
    clusters: dict[str, str] = {}
    for row in rows:
        if measure in row["scores"]:
            by_item.setdefault(row["item"], {})[row["recipe"]] = row["scores"][measure]
            clusters[row["item"]] = row["cluster"]
    if not by_item:
        return None
    recipes = set().union(*by_item.values())
    items = [item for item, known in by_item.items() if known.keys() == recipes]
    if not items:
        return None
    numbers = {name: place for place, name in enumerate(dict.fromkeys(clusters[i] for i in items))}
    values = {name: np.array([by_item[item][name] for item in items]) for name in recipes}
    seed = crc32(rows[0]["task"].encode())
    return Sample(values, np.array([numbers[clusters[item]] for item in items]), seed)


def _score(
    task: str,
    mode: str,
    recipe: str,
    measure: Measure,
    sample: Sample,
    held: Sequence[Row],
    against: str,
) -> Score:
    shown = np.exp if measure.unit == "perplexity" else np.asarray
    ours, other = shown(sample.means(recipe)), shown(sample.means(against))
    floor = float(shown(sample.means(NONE))[0]) if NONE in sample.values else None
    skill, count = _skill(sample, recipe), sample.count
    return Score(
        task,
        mode,
        recipe,
        measure,
        len(sample.clusters),
        count,
        interval(ours, count),
        against,
        float(shown(sample.means(FULL))[0]),
        floor,
        interval(ours - other, count),
        _ratio(ours, other, measure, count),
        None if skill is None else interval(skill[~np.isnan(skill)], count),
        clear_of_floor(sample, measure),
        *(_mean_of(held, name) for name in ("kept", "seen", "bytes", "full_bytes")),
    )


def clear_of_floor(sample: Sample, measure: Measure) -> bool:
    """Whether the full cache beats the floor by at least 4 standard errors of the paired
    difference, and there are enough items to tell.
    """
    if not {FULL, NONE} <= sample.values.keys() or sample.count < ENOUGH:
        return False
    gain = sample.values[FULL] - sample.values[NONE]
    gain = -gain if measure.lower_is_better else gain
    mean = float(gain.mean())
    return mean > 0 and mean >= CLEAR * sample.standard_error(gain)


def _skill(sample: Sample, recipe: str) -> Numbers | None:
    """(recipe - floor) / (full - floor) and its draws; of perplexities, in nats."""
    if NONE not in sample.values:
        return None
    floor = sample.means(NONE)
    return _divided(sample.means(recipe) - floor, sample.means(FULL) - floor)


def _ratio(ours: Numbers, full: Numbers, measure: Measure, count: int) -> Interval | None:
    if measure.unit == "nats" and not measure.lower_is_better:
        return None  # gains and margins may be negative
    if abs(full[0]) < LEAST:
        return None
    part, whole = (full, ours) if measure.lower_is_better else (ours, full)
    return _quotient(part, whole, count)


def _quotient(part: Numbers, whole: Numbers, count: int) -> Interval | None:
    """None where the denominator is nothing, or whose sign a draw can change."""
    found = _divided(part, whole)
    return None if found is None else interval(found[~np.isnan(found)], count)


def _divided(part: Numbers, whole: Numbers) -> Numbers | None:
    """part / whole, NaN in draws whose denominator has another sign than the first."""
    if abs(whole[0]) < LEAST:
        return None
    usable = whole * np.sign(whole[0]) > LEAST
    return np.where(usable, part / np.where(usable, whole, 1.0), np.nan)


def _mean_of(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


@dataclass(frozen=True)
class Standing:
    """One recipe over all tasks that can show a loss.

    skills: for each mode, the mean of the tasks' skills (1 like the full cache, 0 like no context).
    tasks: how many tasks each mode has. kept, bytes: shares of tokens seen and of the full cache's
    bytes, mean over all items.
    """

    recipe: str
    skills: Mapping[str, Interval]
    tasks: Mapping[str, int]
    kept: float
    bytes: float


def standings(rows: Sequence[Row]) -> list[Standing]:
    """The leaderboard: recipes by mean skill, best first."""
    skills: dict[str, dict[str, list[Numbers]]] = {}
    for (task, mode), part in _by_task(rows).items():
        measure = parse_task(task).measures[0]
        sample = sample_of(part, measure.name)
        if sample is None or not clear_of_floor(sample, measure):
            continue
        for recipe in sample.values:
            found = _skill(sample, recipe)
            if found is not None and recipe != NONE:
                skills.setdefault(recipe, {}).setdefault(mode, []).append(found)
    names = [name for name in dict.fromkeys(row["recipe"] for row in rows) if name != NONE]
    ranked = [_standing(name, skills.get(name, {}), rows) for name in names]
    return sorted(ranked, key=lambda one: -_overall(one))


def _standing(recipe: str, skills: Mapping[str, list[Numbers]], rows: Sequence[Row]) -> Standing:
    held = [row for row in rows if row["recipe"] == recipe]
    return Standing(
        recipe,
        {mode: interval(np.nanmean(each, axis=0), ENOUGH) for mode, each in skills.items()},
        {mode: len(each) for mode, each in skills.items()},
        float(np.mean([row["kept"] / max(1, row["seen"]) for row in held])),
        float(np.mean([row["bytes"] / max(1, row["full_bytes"]) for row in held])),
    )


def _overall(standing: Standing) -> float:
    values = [one.value for one in standing.skills.values()]
    return sum(values) / len(values) if values else 0.0


def _by_task(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["mode"]), []).append(row)
    return groups


def by_fact(rows: Sequence[Row], measure: str, fact: str) -> dict[str, dict[Any, float]]:
    """recipe -> value of the fact, a probe's own or its item's -> mean of the measure."""
    found: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        for probe in row["probes"]:
            facts = {**row["facts"], **probe["facts"]}
            if fact in facts and measure in probe["scores"]:
                scores = found.setdefault(row["recipe"], {}).setdefault(facts[fact], [])
                scores.append(probe["scores"][measure])
    return {
        recipe: {value: float(np.mean(scores)) for value, scores in sorted(values.items())}
        for recipe, values in found.items()
    }
