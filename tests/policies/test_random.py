"""Random: a uniform sample of what was seen, the same in any batch and however the text arrives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.policies.random import Random
from tests.support import Feeder

from .rig import Rig


def sample(policy: Random, budget: int, steps: list[int], heads: int = 1) -> list[list[int]]:
    """What is held after these steps."""
    rig = Rig(policy, budget, heads=heads)
    for fresh in steps:
        rig.step(fresh)
    return rig.positions


def counts(tokens: int, budget: int, draws: int) -> Tensor:
    """int64 `[tokens]`: in how many draws each position survived."""
    held = torch.tensor([sample(Random(seed=s), budget, [tokens])[0] for s in range(draws)])
    return held.flatten().bincount(minlength=tokens)


def test_every_token_survives_as_often() -> None:
    """Over 400 draws of a quarter each position is kept within five standard deviations of 100."""
    survived = counts(60, 15, 400)
    deviation = (400 * 0.25 * 0.75) ** 0.5
    assert int(survived.sum()) == 400 * 15
    assert float((survived - 100).abs().max()) < 5 * deviation
    assert 0.5 < float(survived.double().var()) / deviation**2 < 2.0


def test_neighbours_are_drawn_independently() -> None:
    """Of 400 draws, a pair of neighbours survives together as often as any pair would."""
    together = 0
    for seed in range(400):
        held = set(sample(Random(seed=seed), 15, [60])[0])
        together += sum(1 for p in held if p + 1 in held)
    expected = 400 * 59 * (15 / 60) * (14 / 59)
    assert abs(together - expected) < 5 * expected**0.5


@pytest.mark.parametrize("steps", [[50], [1] * 50, [20, *[1] * 10, 20]])
def test_how_the_text_arrives_does_not_matter(steps: list[int]) -> None:
    """A lot is drawn once: a stream ends with the sample that one prompt gives."""
    assert sample(Random(seed=3), 12, steps, heads=3) == sample(Random(seed=3), 12, [50], heads=3)


def test_heads_layers_and_seeds_draw_for_themselves() -> None:
    """No two of them share a sample; the same one draws the same again."""
    drawn = [
        sample(Random(seed=seed).for_layer(layer, 4, 12), 12, [50], heads=3)
        for seed in (0, 1)
        for layer in range(4)
    ]
    assert len({tuple(head) for heads in drawn for head in heads}) == 2 * 4 * 3
    assert sample(Random(seed=1).for_layer(2, 4, 12), 12, [50], heads=3) == drawn[6]
    assert Random(seed=5).for_layer(0, 4, 12) == Random(seed=5)


def test_a_smaller_budget_keeps_a_part_of_a_larger_ones_sample() -> None:
    """The highest lots of the highest lots."""
    small, large = (set(sample(Random(), budget, [80])[0]) for budget in (10, 30))
    assert small < large


def test_sinks_and_window_are_kept_beside_the_sample() -> None:
    """Only what lies between is drawn."""
    feeder = Feeder("random(sink=3, recent=5, slack=0)@20", tapes=(0, 1))
    for fresh in (100, *[1] * 30):
        feeder.step(fresh)
    for head in feeder.layer.slots.position.flatten(0, 1).tolist():
        assert head[:3] == [0, 1, 2]
        assert head[-5:] == list(range(125, 130))
        assert len(head) == 20


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sink": -1}, r"random: sink must be at least 0, got -1"),
        ({"recent": -2}, r"random: recent must be at least 0, got -2"),
        ({"seed": -1}, "random: seed must be between 0 and 2147483647, got -1"),
        ({"seed": 2**31}, "random: seed must be between 0 and 2147483647, got 2147483648"),
    ],
)
def test_bad_knobs(knobs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Random(**knobs)
