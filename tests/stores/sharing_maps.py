"""Profiles of KVSharer that were not learnt, for models of any size."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvhive.cache.attention import attach
from kvhive.calibration import Profile

Pair = tuple[int, int]


def profile(pairs: Sequence[Sequence[int]], layers: int, fingerprint: str = "") -> Profile:
    """Of a model of so many layers, with these pairs."""
    return Profile(
        "kvsharer",
        fingerprint,
        "nothing",
        "2026-11-28",
        {
            "pairs": torch.tensor(pairs).view(-1, 2),
            "similarity": torch.linspace(0.9, 0.6, len(pairs), dtype=torch.float64),
            "distance": torch.ones(layers, layers, dtype=torch.float64).tril(-1),
            "asked": torch.tensor([len(pairs)]),
        },
    )


def profile_of(model: PreTrainedModel, pairs: Sequence[Sequence[int]]) -> Profile:
    """For a model."""
    facts = attach(model)
    return profile(pairs, len(facts.full_layers), facts.fingerprint)


def random_pairs(layers: int, count: int, seed: int) -> list[Pair]:
    """Any that a search may accept."""
    draw = random.Random(seed)
    return [(later, draw.randrange(later)) for later in draw.sample(range(1, layers), count)]
