"""KVSharer: distances of layers, their ranking, every map that is tried, and the one that stays."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.learning.kvsharer import dissimilarities, ranked, search
from kvhive.stores.kvsharer import shared

from ..cases import Case
from ..playing import require


def replay(case: Case) -> None:
    """Compare with the recording, whose stand-in for the model is a table of costs."""
    params, tensors = case.params, case.tensors
    count = params["layers"]
    (keys, used), (values, _) = mean_of(case, "k_cal"), mean_of(case, "v_cal")
    distances = dissimilarities(list(keys), list(values))
    # The reference leaves out texts of other lengths, but divides by the number of all of them.
    divided = used / len(params["calibration_lengths"])
    for (i, j), distance in distances.items():
        recorded = float(tensors["distance"][i, j])
        require(
            abs(distance * divided - recorded) <= 1e-5 * recorded,
            f"distance of layers {i} and {j}: {distance * divided:.7f}, recorded {recorded:.7f}",
        )
    pairs = ranked(distances)
    recorded_pairs = [tuple(pair) for pair in tensors["rank"].tolist()]
    require(pairs == recorded_pairs, f"rank: {pairs}, recorded {recorded_pairs}")

    def similarity(sources: tuple[int, ...]) -> float:
        """The recording's stand-in."""
        costs = [float(tensors["cost"][i, j]) for i, j in enumerate(sources) if i != j]
        return 1 - sum(costs)

    share, threshold = params["share_layers"], params["threshold"]
    trials = list(search(pairs, count, share, threshold, similarity))
    tried, recorded_maps = [list(trial.sources) for trial in trials], tensors["tried_maps"].tolist()
    require(tried == recorded_maps, f"maps tried: {tried}, recorded {recorded_maps}")
    alike = torch.tensor([trial.similarity for trial in trials], dtype=torch.float64)
    recorded_alike = tensors["tried_similarity"]
    require(
        torch.allclose(alike, recorded_alike, rtol=0, atol=1e-9),
        f"similarity: {alike.tolist()}, recorded {recorded_alike.tolist()}",
    )
    found = shared(count, [trial.pair for trial in trials if trial.accepted])
    final = tensors["final_map"].tolist()
    require(list(found) == final, f"final map: {list(found)}, recorded {final}")


def mean_of(case: Case, name: str) -> tuple[Tensor, int]:
    """`[layers, heads, n, d]`, the mean over the texts as long as the first, and how many they are.

    Texts that we learn from are all of one length.
    """
    texts = [case.tensors[f"{name}{i}"] for i in range(len(case.params["calibration_lengths"]))]
    alike = [text for text in texts if text.shape == texts[0].shape]
    return torch.stack(alike).double().mean(0), len(alike)
