"""L2 norm: kept tokens after prompts and in a stream, in three implementations."""

from __future__ import annotations

import math

from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.policies.l2norm import L2Norm

from ..cases import Case
from ..playing import feed, make_layer, require, same_heads


def replay(case: Case) -> None:
    """Compare with `KnormPress`, `L2NormCluster`, or `l2_compress` called once or often."""
    if "compression_ratios" in case.params:
        replay_press(case)
    elif "max_capacity_prompt" in case.params:
        replay_capacity(case)
    elif "kept_sorted_per_step" in case.tensors:
        replay_stream(case)
    else:
        replay_layers(case)


def layer_of(case: Case, budget: int, index: int = 0, slack: int = 0) -> HiveLayer:
    """What layer `index` of a model gets; a layer that is left out has no budget."""
    skipped = tuple(case.params.get("skip_layers", ()))
    layers = max((index, *skipped)) + 1
    policy = L2Norm(skip_layers=skipped).for_layer(index, layers, budget)
    alone = L2Norm() if isinstance(policy, L2Norm) else policy
    return make_layer(alone, budget, slack=slack)


def replay_press(case: Case) -> None:
    """Several ratios on the same keys, all rows of the batch at once."""
    keys = case.tensors["keys"]
    for ratio in case.params["compression_ratios"]:
        recorded = case.tensors[f"kept_sorted_cr{ratio}"]
        held = feed(layer_of(case, int(keys.shape[2] * (1 - ratio))), keys)
        for row in range(len(keys)):
            same_heads(held[row], recorded[row], f"step 0, ratio {ratio}, row {row}")


def replay_capacity(case: Case) -> None:
    """A fixed number of tokens, in one layer of a model."""
    layer = layer_of(case, case.params["max_capacity_prompt"], case.params["layer_idx"])
    held = feed(layer, case.tensors["keys"][None])
    same_heads(held[0], case.tensors["kept_sorted"], "step 0")


def replay_layers(case: Case) -> None:
    """A share of the prompt, in all layers of a model."""
    all_keys = case.tensors["keys"]
    budget = left_of(case, all_keys.shape[2])
    for index, keys in enumerate(all_keys):
        held = feed(layer_of(case, budget, index), keys[None])[0]
        same_heads(held, case.tensors["kept_sorted"][index], f"step 0, layer {index}")
        same_count(held, case.tensors["kept_count"][index], f"step 0, layer {index}")


def replay_stream(case: Case) -> None:
    """Token by token. Nothing goes until `full` tokens are there, then all but a share.

    So the reference's two knobs amount to a budget of `full - 1` and a slack.
    """
    keys = case.tensors["keys"]
    full = next(held for held in range(1, 10**6) if left_of(case, held) < held)
    layer = layer_of(case, full - 1, slack=full - 1 - left_of(case, full))
    for step in range(keys.shape[1]):
        held = feed(layer, keys[None, :, step : step + 1])[0]
        same_heads(held, case.tensors["kept_sorted_per_step"][step], f"step {step}")
        same_count(held, case.tensors["kept_count"][step], f"step {step}")


def left_of(case: Case, held: int) -> int:
    """How many of `held` tokens `l2_compress` keeps."""
    share = case.params["keep_ratio"]
    return math.ceil(share * held) if held >= case.params["prune_after"] else held


def same_count(held: Tensor, recorded: Tensor, where: str) -> None:
    """As many tokens as recorded."""
    kept, expected = held.shape[-1], int(recorded)
    require(kept == expected, f"{where}: {kept} tokens kept, recorded {expected}")
