"""Profiles that come with the package: whole, small, of a known method, and found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvhive.allocations import ALLOCATIONS
from kvhive.allocations.baklava import Baklava
from kvhive.calibration import Profile, shipped
from kvhive.calibration.shipped import shipped as made_by
from kvhive.kernels.low_rank import FeatureMaps
from kvhive.stores import STORES

FOLDER = Path(shipped.__file__).parent / "profiles"
FILES = sorted(FOLDER.iterdir())


def test_every_method_has_one() -> None:
    assert [path.name for path in FILES] == [
        "baklava-smollm2.safetensors",
        "kvsharer-smollm2.safetensors",
        "less-smollm2.safetensors",
        "zigzag-smollm2.safetensors",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_suits_its_method(path: Path) -> None:
    """SmolLM2-135M has 30 layers, 9 heads and 3 KV heads."""
    profile = Profile.load(path)
    method = path.name.partition("-")[0]
    assert profile.method == method
    assert [one.fingerprint for one in made_by(method)] == [profile.fingerprint]
    {**ALLOCATIONS, **STORES}[method]().check_profile(profile, 30, 3)
    assert path.stat().st_size < (1_600_000 if method == "less" else 64 * 1024)
    assert profile.data


def test_all_are_of_the_same_model() -> None:
    assert len({Profile.load(path).fingerprint for path in FILES}) == 1


def test_kernels_leave_less_of_the_error_than_eviction_alone() -> None:
    held = Profile.load(FOLDER / "less-smollm2.safetensors").tensors
    assert float(held["curve"].amin(1).max()) < 1
    assert all(held[name].dtype == torch.float16 for name in FeatureMaps.names())


def test_importance_hardly_depends_on_the_text() -> None:
    """Ranks from half of the texts are those from the others."""
    whole = Profile.load(FOLDER / "baklava-smollm2.safetensors")
    ranks: list[Tensor] = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        tensors = {name: whole.tensors[name][half] for name in ("heads", "layers")}
        part = Profile("", "", "", "", {**whole.tensors, **tensors})
        ranks.append(Baklava().importance(part).flatten().argsort().argsort().double())
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.95


def test_the_choice_is_not_worse_than_uniform() -> None:
    held = Profile.load(FOLDER / "baklava-smollm2.safetensors").tensors
    row = int((held["parts"] == held["choice"][0]).nonzero())
    column = int((held["scales"] == held["choice"][1]).nonzero())
    assert held["losses"][row, column] == held["losses"].min() <= held["uniform"].item()
