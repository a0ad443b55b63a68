"""Profiles: there and back, refused for other models, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvhive.allocations import ALLOCATIONS, Allocation, Facts
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.model.facts import ModelFacts
from kvhive.stores import STORES, LayerFacts, Store
from kvhive.stores.dense import Dense
from tests.support import random_ids, read, tiny_llama

PROFILE = Profile("weighted", "0" * 64, "an essay", "2026-11-27", {"weight": torch.tensor([3, 1])})


@pytest.fixture(autouse=True)
def parts() -> Iterator[list[LayerFacts]]:
    """An allocation and a store that read profiles, registered meanwhile; what the store saw."""
    seen: list[LayerFacts] = []

    @dataclass(frozen=True)
    class Weighted(Allocation):
        """Layers by weight."""

        calibration: ClassVar[str | None] = "weighted"

        def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
            """As the profile says."""
            assert facts.profile is not None
            weight = facts.profile.tensors["weight"]
            total = budget * facts.layers
            return (total * weight // weight.sum())[:, None].expand(-1, facts.kv_heads)

    @dataclass(frozen=True)
    class Knowing(Dense):
        """Dense, and asks for a profile."""

        calibration: ClassVar[str | None] = "weighted"

        def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> Any:
            """Remember what it was told."""
            seen.append(facts)
            return super().new(facts, earlier)

    ALLOCATIONS.register("weighted")(Weighted)  # type: ignore[attr-defined]
    STORES.register("knowing")(Knowing)  # type: ignore[attr-defined]
    yield seen
    for registry, name in ((ALLOCATIONS, "weighted"), (STORES, "knowing")):
        del registry._classes[name]  # type: ignore[attr-defined]


def test_there_and_back(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "a.safetensors")
    again = Profile.load(str(tmp_path / "a.safetensors"))
    assert torch.equal(again.tensors["weight"], PROFILE.tensors["weight"])
    told = ("method", "fingerprint", "data", "date")
    assert [getattr(again, name) for name in told] == [getattr(PROFILE, name) for name in told]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"], "nothing else is left behind"


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.safetensors' exists; delete it first"):
        PROFILE.save(path)
    assert path.read_text() == "mine"


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no profile at"):
        Profile.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is no safetensors file, or damaged"):
        Profile.load(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is no profile of this version"):
        Profile.load(tmp_path / "weights")


def mine(model: Any) -> Profile:
    """A profile of this model."""
    return replace(PROFILE, fingerprint=ModelFacts.of(model).fingerprint)


def test_allocations_and_stores_see_it(parts: list[LayerFacts], tmp_path: Path) -> None:
    model = tiny_llama()
    mine(model).save(tmp_path / "p")
    recipe = "window(slack=0)@40/weighted+knowing"
    for profile in (mine(model), tmp_path / "p", str(tmp_path / "p")):
        parts.clear()
        cache = HiveCache.for_model(model, recipe, profile=profile)
        read(model, cache, random_ids(1, 120), 120)
        assert cache.report().kept[:, 0, 0].tolist() == [60, 20]
        assert [(one.place, one.layers) for one in parts] == [(0, 2), (1, 2)]
        assert all(one.profile is not None for one in parts)


def test_a_profile_of_another_model_is_refused() -> None:
    profile = mine(tiny_llama(seed=1))
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(tiny_llama(), "window@40/weighted", profile=profile)


def test_a_profile_that_is_missing_or_not_read_is_said() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="weighted reads a profile, and none of this model comes"):
        HiveCache.for_model(model, "window@40/weighted")
    with pytest.raises(ValueError, match="reads no profile, but one by 'weighted' was given"):
        HiveCache.for_model(model, "window@40", profile=mine(model))
    other = replace(mine(model), method="other")
    with pytest.raises(ValueError, match="expected a profile made by 'weighted', got one by 'oth"):
        HiveCache.for_model(model, "window@40/weighted", profile=other)
