"""Figures against slow, obvious arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvhive.evaluation.measures import CHOICE, NLL, PERPLEXITY
from kvhive.evaluation.report.run import front
from kvhive.evaluation.statistics import (
    DRAWS,
    Sample,
    by_fact,
    clear_of_floor,
    draws,
    interval,
    sample_of,
    scores,
    standings,
)


def row(item, recipe, value, task="kv", measure="choice", cluster=None, **more):
    held = {"kept": 5.0, "seen": 10, "bytes": 50, "full_bytes": 100}
    return {
        "task": task,
        "mode": "agnostic",
        "item": str(item),
        "recipe": recipe,
        "cluster": cluster or str(item),
        "scores": {measure: value},
        "probes": [{"scores": {measure: value}, "facts": {}}],
        "facts": {},
        **held,
        **more,
    }


def rows_of(values: dict[str, list[float]], **more):
    return [
        row(item, recipe, value, **more)
        for recipe, column in values.items()
        for item, value in enumerate(column)
    ]


def test_draws_are_paired_across_recipes():
    """A recipe that is always 0.1 worse is 0.1 worse in every draw, whatever the items."""
    rng = random.Random(0)
    full = [rng.random() for _ in range(30)]
    rows = rows_of({"full": full, "h2o@0.4": [x - 0.1 for x in full], "none": [0.0] * 30})
    score = next(s for s in scores(rows) if s.recipe == "h2o@0.4")
    assert score.difference.value == pytest.approx(-0.1)
    assert score.difference.low == pytest.approx(-0.1)
    assert score.difference.high == pytest.approx(-0.1)
    assert score.score.low < score.score.value < score.score.high


def test_means_of_draws_are_those_of_the_items_drawn():
    values = {"full": np.array([0.0, 1.0, 5.0, 2.0])}
    sample = Sample(values, np.array([0, 0, 1, 2]))  # the first two items belong together
    means = sample.means("full")
    assert means[0] == 2.0
    drawn = draws(3, 0)
    clusters = [[0.0, 1.0], [5.0], [2.0]]
    for place in (0, 1, 17, DRAWS - 1):
        taken = [value for cluster in drawn[place] for value in clusters[cluster]]
        assert means[1 + place] == pytest.approx(sum(taken) / len(taken))


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = {"full": rng.normal(0.5, 1, 40)}
        found = interval(Sample(values, np.arange(40)).means("full"), 40)
        covered += found.low <= 0.5 <= found.high
    assert 178 <= covered <= 199


def test_a_ratio_of_one_is_no_loss_in_either_direction():
    choice = rows_of({"full": [0.8, 0.6], "a": [0.4, 0.3], "none": [0.1, 0.1]})
    loss = rows_of(
        {"full": [1.0, 3.0], "a": [2.0, 6.0], "none": [8.0, 8.0]}, task="verbatim", measure="nll"
    )
    found = {(s.measure.name, s.recipe): s for s in scores([*choice, *loss])}
    assert found["choice", "full"].ratio.value == found["nll", "full"].ratio.value == 1
    assert found["choice", "a"].ratio.value == pytest.approx(0.5)
    assert found["nll", "a"].ratio.value == pytest.approx(0.5)
    assert found["choice", "a"].skill.value == pytest.approx(0.25 / 0.6)
    assert found["nll", "a"].skill.value == pytest.approx(4 / 6)
    assert found["nll", "none"].skill.value == 0


def test_perplexity_is_shown_as_exp_and_its_skill_is_in_nats():
    rows = rows_of(
        {"full": [2.0, 2.0], "a": [3.0, 3.0], "none": [4.0, 4.0]},
        task="wikitext",
        measure="perplexity",
    )
    score = next(s for s in scores(rows) if s.recipe == "a")
    assert score.score.value == pytest.approx(np.exp(3))
    assert score.ratio.value == pytest.approx(np.exp(-1))
    assert score.skill.value == pytest.approx(0.5)


def test_ratios_that_mean_nothing_are_left_out():
    rows = rows_of({"full": [0.0, 0.0], "a": [1.0, 2.0], "none": [3.0, 3.0]}, task="fidelity")
    rows = [{**one, "scores": {"kl": one["scores"]["choice"]}} for one in rows]
    assert all(score.ratio is None for score in scores(rows))


@pytest.mark.parametrize(
    ("full", "clear"), [([1.0, 0.0] * 20, True), ([1.0, 0.0, 0.0, 0.0] * 10, False)]
)
def test_four_standard_errors_from_the_floor(full, clear):
    """40 items, floor 0: mean 0.5 has a standard error of 0.08, mean 0.25 one of 0.069."""
    sample = sample_of(rows_of({"full": full, "none": [0.0] * 40}), "choice")
    assert sample.standard_error(sample.values["full"]) == pytest.approx(
        np.std(full, ddof=1) / np.sqrt(40)
    )
    assert clear_of_floor(sample, CHOICE) is clear


def test_a_floor_above_the_full_cache_is_not_clear():
    sample = sample_of(rows_of({"full": [3.0, 3.1] * 3, "none": [2.0, 2.1] * 3}), "choice")
    assert clear_of_floor(sample, NLL) is False
    assert clear_of_floor(sample, PERPLEXITY) is False
    assert clear_of_floor(sample, CHOICE) is True


@pytest.mark.parametrize(("items", "enough"), [(1, False), (2, False), (4, False), (5, True)])
def test_a_few_items_give_no_interval_and_no_verdict(items, enough):
    """Two that agree would otherwise look certain: 100 % +- 0."""
    values = {"full": [1.0] * items, "a": [0.5] * items, "none": [0.0] * items}
    found = next(s for s in scores(rows_of(values)) if s.recipe == "a")
    for figure in (found.score, found.difference, found.ratio, found.skill):
        assert (figure.half is not None) == enough
    assert found.difference.value == -0.5
    assert found.clear == enough
    assert any(one.skills for one in standings(rows_of(values))) == enough


def test_without_the_full_cache_nothing_is_clear():
    rows = rows_of({"a": [1.0] * 9, "none": [0.0] * 9})
    assert scores(rows) == []
    assert all(not one.skills for one in standings(rows))


def test_one_cluster_says_nothing():
    rows = [
        row(item, recipe, value, cluster="same")
        for recipe, value in (("full", 1.0), ("none", 0.0))
        for item in range(9)
    ]
    assert clear_of_floor(sample_of(rows, "choice"), CHOICE) is False


def test_items_that_some_recipe_lacks_do_not_count():
    rows = rows_of({"full": [1.0, 0.0], "a": [1.0]})
    sample = sample_of(rows, "choice")
    assert sample.values["full"].tolist() == [1.0]


def test_the_leaderboard_takes_clear_tasks_alone():
    clear = rows_of({"full": [1.0] * 9, "a": [0.5] * 9, "b": [0.8] * 9, "none": [0.0] * 9})
    blurred = rows_of(
        {"full": [1.0, 0.0], "a": [1.0, 1.0], "b": [0.0, 0.0], "none": [0.0, 1.0]},
        task="passkey",
        measure="exact",
    )
    best = standings([*clear, *blurred])
    assert [one.recipe for one in best] == ["full", "b", "a"]
    assert best[1].skills["agnostic"].value == pytest.approx(0.8)
    assert best[1].tasks == {"agnostic": 1}
    assert best[1].kept == best[1].bytes == 0.5


def test_means_by_fact():
    got = [
        {**row(0, "full", 1.0), "facts": {"turn": 1}},
        {**row(1, "full", 0.0), "facts": {"turn": 1}},
        {**row(2, "full", 1.0), "facts": {"turn": 2}},
    ]
    assert by_fact(got, "choice", "turn") == {"full": {1: 0.5, 2: 1.0}}


def test_the_pareto_front():
    points = [(1.0, 0.2), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (4.0, 0.9)]
    assert front(points) == [True, True, False, False, True]
