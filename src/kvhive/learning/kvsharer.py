"""What KVSharer learns: which layers can do with the keys and values of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvhive.cache.attention import attach
from kvhive.calibration import Profile
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.learning.picture import Picture
from kvhive.model.forward import last_hidden
from kvhive.spec import knob
from kvhive.stores.kvsharer import METHOD, SHAPES, linked, pairs_of, shared

Pair = tuple[int, int]  # (a layer that may share, the earlier one whose tokens it is given)
_MANY = 0.5  # share of the layers that is searched for, so that half as many can be used


@CALIBRATIONS.register(METHOD)
@dataclass(frozen=True)
class KVSharerCalibration(Calibration):
    """Try pairs of layers, the most dissimilar first, and take those with which the model still
    says the same.

    Dissimilar are layers whose keys and values, averaged over the pieces, lie far apart. Whether
    the model says the same is told by its last hidden states: with a pair taken, and all those
    taken before, their cosine with those of the model as it is, averaged over the pieces, must be
    above `threshold`.

    Tensors: see `stores/kvsharer.py`; layers are counted among those that are compressed.

    Source: Yang et al. 2024, arXiv:2410.18517, algorithm 1 and the code released with it.
    """

    source: ClassVar[str] = "arXiv:2410.18517"

    pieces: int = knob(30, "most pieces of text that are read", least=1)
    tokens: int = knob(64, "length of a piece, in tokens", least=64)
    layers: int | None = knob(None, "how many layers are to share; none: half of them", least=1)
    threshold: float = knob(0.5, "cosine that must be exceeded", least=-1, most=1)

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """See the base. Raises `ValueError` where no layer can share."""
        reading = Reading.of(model, texts)
        count = len(reading.full)
        asked = round(_MANY * count) if self.layers is None else self.layers
        if asked >= count:
            raise ValueError(
                f"kvsharer: layers must be below the {count} compressed layers of this model, got "
                f"{asked}"
            )
        distances = dissimilarities(reading.keys, reading.values)

        def similarity(sources: tuple[int, ...]) -> float:
            key = "map " + " ".join(map(str, sources))
            part = kept.get(key)
            if part is None:
                part = {"similarity": torch.tensor(reading.similarity(sources)).double()}
                kept.put(key, part)
            return float(part["similarity"])

        taken: list[Trial] = []
        for trial in search(ranked(distances), count, asked, self.threshold, similarity):
            if trial.accepted:
                taken.append(trial)
            tick(max(len(taken) / asked, trial.place / len(distances)))
        tick(1.0)
        if not taken:
            raise ValueError(
                f"kvsharer: no layer can share with a cosine above {self.threshold}; lower the "
                "setting threshold"
            )
        return {
            "pairs": torch.tensor([trial.pair for trial in taken]),
            "similarity": torch.tensor([trial.similarity for trial in taken]).double(),
            "distance": _square(distances, count),
            "asked": torch.tensor([asked]),
        }

    @classmethod
    def pictures(cls, profile: Profile) -> tuple[Picture, ...]:
        """Whose tokens each layer attends to, as pairs are taken; and how far layers are apart."""
        profile.check_tensors(SHAPES)
        distance, found = profile.tensors["distance"], pairs_of(profile)
        count, asked = len(distance), int(profile.tensors["asked"])
        maps = [shared(count, found[:taken]) for taken in range(1, len(found) + 1)]
        likeness = float(profile.tensors["similarity"][-1])
        columns = tuple(f"{taken} share" for taken in range(1, len(found) + 1))
        return (
            Picture(
                f"the layer whose tokens each layer attends to, when so many share; the search "
                f"found {len(found)} of {asked}, with a cosine of {likeness:.3f} at the end",
                columns,
                torch.tensor(maps).T.double(),
                ".0f",
            ),
            Picture(
                "distance of a layer's keys and values from those of each earlier one",
                tuple(f"{place}" for place in range(count)),
                distance,
                ".1f",
            ),
        )

    @classmethod
    def remark(cls, profile: Profile) -> str:
        """That fewer layers can share than were asked for."""
        found, asked = len(profile.tensors["pairs"]), int(profile.tensors["asked"])
        if found == asked:
            return ""
        return f"{found} layers can share, of {asked} asked for; a lower threshold allows more"


# ---- the search ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A pair that was tried. place: in the ranking, from 1; sources: the map that it makes with
    those taken before, chains resolved; similarity: of the model with it.
    """

    place: int
    pair: Pair
    sources: tuple[int, ...]
    similarity: float
    accepted: bool


def search(
    pairs: Sequence[Pair],
    layers: int,
    target: int,
    threshold: float,
    similarity: Callable[[tuple[int, ...]], float],
) -> Iterator[Trial]:
    """Try pairs in turn until `target` of them were accepted, those of layers that share left out.

    similarity: of the model under a map with the model as it is; a pair is accepted above
    `threshold`.
    """
    sources, accepted = tuple(range(layers)), 0
    for place, (later, earlier) in enumerate(pairs, start=1):
        if accepted == target:
            return
        if sources[later] != later:
            continue
        tried = linked(sources, later, earlier)
        alike = similarity(tried)
        taken = alike > threshold
        yield Trial(place, (later, earlier), tried, alike, taken)
        if taken:
            sources, accepted = tried, accepted + 1


def ranked(distances: Mapping[Pair, float]) -> list[Pair]:
    """Pairs, the most distant first; of equals the later layer first, then the later source."""
    return sorted(distances, key=lambda pair: (distances[pair], *pair), reverse=True)


def dissimilarities(keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[Pair, float]:
    """The distance of every layer from every earlier one with as many heads of the same width.

    keys `[K, n, d]` and values `[K, n, e]` of each layer, averaged over texts. It is the mean of
    two: that of keys and that of values, each the mean over heads and positions of the length of
    the difference.
    """

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other.double()).norm(dim=-1).mean())

    sizes = [(key.shape, value.shape) for key, value in zip(keys, values, strict=True)]
    return {
        (i, j): (apart(keys[i], keys[j]) + apart(values[i], values[j])) / 2
        for i in range(len(keys))
        for j in range(i)
        if sizes[i] == sizes[j]
    }


def _square(distances: Mapping[Pair, float], layers: int) -> Tensor:
    square = torch.zeros(layers, layers, dtype=torch.float64)
    for (i, j), distance in distances.items():
        square[i, j] = distance
    return square


# ---- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """Pieces of equal length as the model reads them, and what they left.

    full: indices of the compressed layers. keys `[K, n, d]` and values `[K, n, e]` of each of them,
    after rotation, averaged over the pieces; hidden: `[pieces, n * width]`, the last hidden states.
    """

    model: PreTrainedModel
    ids: Tensor
    full: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Reading:
        """Of the model as it is. Raises `ValueError` for one whose numbers are not finite."""
        facts = attach(model)
        ids = torch.tensor([list(text) for text in texts])
        cache = DynamicCache(config=facts.config)
        hidden = last_hidden(model, cache, ids).flatten(1)
        if not bool(hidden.isfinite().all()):
            raise ValueError(
                f"{facts.family} ends in numbers that are not finite; calibrate it in another "
                "dtype, such as float32"
            )
        layers: list[Any] = [cache.layers[index] for index in facts.full_layers]
        keys = [layer.keys.double().mean(0) for layer in layers]
        values = [layer.values.double().mean(0) for layer in layers]
        return cls(model, ids, facts.full_layers, keys, values, hidden)

    def similarity(self, sources: Sequence[int]) -> float:
        """Mean cosine of the last hidden states under a map with those of the model as it is."""
        cache = SharingCache(config=self.model.config.get_text_config(decoder=True))
        cache.sources = {
            index: self.full[source] for index, source in zip(self.full, sources, strict=True)
        }
        hidden = last_hidden(self.model, cache, self.ids).flatten(1)
        return float(F.cosine_similarity(hidden.double(), self.hidden.double()).mean())


class SharingCache(DynamicCache):
    """The stock cache, but that some layers are given the keys and values of another. sources: by
    the index of each layer; others keep their own.
    """

    sources: Mapping[int, int]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of the stock cache, or what the source holds with this step's tokens."""
        source = self.sources.get(layer_idx, layer_idx)
        if source == layer_idx:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held = self.layers[source]
        assert isinstance(held, DynamicLayer) and held.keys is not None and held.values is not None
        return held.keys, held.values
