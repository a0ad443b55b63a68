"""PyramidKV: what each layer may keep, and which tokens it keeps."""

from __future__ import annotations

from kvhive.allocations import Facts
from kvhive.allocations.pyramid import Pyramid

from ..cases import Case
from ..playing import feed, make_layers, require, same_heads
from .snapkv import policy_of


def replay(case: Case) -> None:
    """Compare with `PyramidKVCluster` of KVCache-Factory, or with `PyramidKVPress`."""
    if "config" not in case.tensors:
        replay_layers(case)
    elif case.facts["case"].startswith("kvpress"):
        for row in range(len(case.tensors["config"])):
            layers, seen, ratio, window, beta = case.tensors["config"][row].tolist()
            budget = round(seen * (1 - ratio))
            same_budgets(case, row, int(layers), budget, int(window), int(seen), "kvpress", beta)
    else:
        for row, config in enumerate(case.tensors["config"].tolist()):
            layers, budget, window, beta, seen = config
            same_budgets(case, row, layers, budget, window, seen, "reference", beta)


def same_budgets(
    case: Case,
    row: int,
    layers: int,
    budget: int,
    window: int,
    seen: int,
    schedule: str,
    beta: float,
) -> None:
    """The tokens that every layer keeps of a prompt."""
    pyramid = Pyramid(beta=int(beta), schedule=schedule)  # type: ignore[arg-type]
    shares = pyramid.shares(Facts(layers, 1, seen), budget, window + 1)[:, 0]
    ours = shares.clamp_max(seen).tolist()
    recorded = case.tensors["kept_per_layer"][row, :layers].tolist()
    require(ours == recorded, f"row {row}: layers keep {ours}, recorded {recorded}")


def replay_layers(case: Case) -> None:
    """A prompt through all layers, scored as SnapKV does."""
    params, tensors = case.params, case.tensors
    pyramid = Pyramid(beta=params["beta"], schedule="reference")
    budget, count = params["max_capacity_prompt"], params["layers"]
    layers = make_layers(policy_of(case), budget, count, allocation=pyramid)
    for index, layer in enumerate(layers):
        position = feed(layer, tensors["k"][index][None], tensors["q"][index][None])[0]
        where = f"step 0, layer {index}"
        kept, recorded = position.shape[-1], int(tensors["kept_count"][index])
        require(kept == recorded, f"{where}: {kept} tokens kept, recorded {recorded}")
        same_heads(position, tensors["kept_sorted_low_tie"][index], where)
        clear = tensors["boundary_gap"][index] > 0
        same_heads(position[clear], tensors["kept_sorted"][index][clear], f"{where}, no tie")
