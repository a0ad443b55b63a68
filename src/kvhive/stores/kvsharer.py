"""KVSharer: some layers hold nothing and attend to what an earlier layer holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvhive.calibration import Profile
from kvhive.spec import knob, parse
from kvhive.stores.base import STORES, LayerFacts, Store, StoreKind

METHOD = "kvsharer"
SHAPES = {  # what a profile holds; P pairs, L compressed layers
    "pairs": "P 2",  # (the layer that shares, the earlier one it was given), as they were accepted
    "similarity": "P",  # of what the model makes of the texts, with these pairs and without
    "distance": "L L",  # how much two layers' keys and values differ; 0 where not i > j
    "asked": "1",  # how many pairs the search was to find
}
USUAL = 0.25  # share of the layers that the paper shares


@STORES.register(METHOD)
@dataclass(frozen=True)
class KVSharer(StoreKind):
    """Some layers hold no keys and values, and attend to those of an earlier layer.

    Which ones was searched once for a model, by `kvhive calibrate --for kvsharer`: pairs whose keys
    and values differ most are tried first, and taken where the model's output stays alike. Policies
    and budgets are those of the layers that hold tokens: what goes there is gone for those that
    share.

    Source: Yang et al. 2024, arXiv:2410.18517.
    """

    source: ClassVar[str] = "arXiv:2410.18517"
    calibration: ClassVar[str | None] = METHOD

    layers: int | None = knob(
        None, "how many layers share; none: a quarter of all, or what the search found", least=0
    )
    store: str = knob("dense", "how the other layers hold their tokens")
    profile: str | None = knob(None, "file of the profile; none: one that comes with kvhive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._inner.calibration is not None:
            raise ValueError(
                f"kvsharer: store must be one that reads no profile, such as dense, got "
                f"{self.store!r}"
            )

        if not self._inner.shareable:
            raise ValueError(
                f"kvsharer: {self._inner.name} holds what queries of its own layer use, and other "
                f"layers would read it; take another store than {self.store!r}, such as rotated"
            )

    @property
    def rewritable(self) -> bool:  # type: ignore[override]
        """See the base; that of the other layers' store."""
        return self._inner.rewritable

    def check_heads(self, width: int) -> None:
        """See the base."""
        self._inner.check_heads(width)

    @property
    def fullest(self) -> StoreKind:
        """See the base."""
        return self._inner.fullest

    @property
    def _inner(self) -> StoreKind:
        return parse(STORES, self.store)

    @property
    def best(self) -> float | None:
        """See the base."""
        return self._inner.best

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> Store:
        """A store for a layer that holds tokens."""
        return self._inner.new(facts, earlier)

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """See the base."""
        profile.check_tensors(SHAPES)
        held, found = len(profile.tensors["distance"]), pairs_of(profile)
        if held != layers:
            raise ValueError(
                f"this profile is of {held} layers, which does not fit {layers} compressed layers; "
                "make one for this model"
            )
        sharing = [later for later, _ in found]
        if len(set(sharing)) < len(sharing) or not all(0 <= j < i < layers for i, j in found):
            raise ValueError(
                f"this profile by 'kvsharer' is damaged: {found} are no pairs of a layer and an "
                "earlier one; make it anew"
            )
        if self.layers is not None and self.layers > len(found):
            raise ValueError(
                f"kvsharer: layers must be at most {len(found)}, which is what the search found "
                f"for this model, got {self.layers}"
            )

    def sources(self, layers: int, profile: Profile | None) -> Sequence[int]:
        """The first of the pairs found, chains resolved. Without a profile nobody shares."""
        if profile is None:
            return range(layers)
        found, wanted = pairs_of(profile), self.layers
        if wanted is None:
            wanted = round(USUAL * layers)
            if wanted > len(found):
                warnings.warn(
                    f"kvsharer: {len(found)} layers share, not {wanted}: the search found no more",
                    stacklevel=2,
                )
        return shared(layers, found[:wanted])


def pairs_of(profile: Profile) -> list[tuple[int, int]]:
    """The pairs a search accepted, in order."""
    return [(later, earlier) for later, earlier in profile.tensors["pairs"].tolist()]


def shared(layers: int, pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """For each layer the one it attends to, when these pairs have been taken one after the other.

    No layer points forward, nor at one that shares itself; the first keeps its own.
    """
    sources = tuple(range(layers))
    for later, earlier in pairs:
        sources = linked(sources, later, earlier)
    return sources


def linked(sources: Sequence[int], later: int, earlier: int) -> tuple[int, ...]:
    """The map in which `later` attends to `earlier`, chains resolved from the first layer on."""
    found = list(sources)
    found[later] = earlier
    for place, source in enumerate(found):
        found[place] = found[source]
    return tuple(found)
