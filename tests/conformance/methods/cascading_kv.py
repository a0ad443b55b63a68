"""Cascading KV cache: tokens, levels, scores, rotary positions and outputs of every call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.policies.cascading import Cascading
from kvhive.rope import Rotation

from ..cases import Case
from ..playing import make_layer, require


def replay(case: Case) -> None:
    """Compare with `CascadingKVCache`; recorded queries and keys have no rotary position yet."""
    params, tensors = case.params, case.tensors
    policy = policy_of(case)
    width = params["head_dim"]
    frequencies = params["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    rotation = Rotation(frequencies)
    turning = None if params["original_rope_positions"] else rotation
    layer = make_layer(policy, policy.sizing.implied, turning)
    tokens = torch.arange(tensors["k"].shape[1])
    query, keys = (rotation.rotate(tensors[x][None], tokens, len(tokens)) for x in "qk")
    start = 0
    for call, fresh in enumerate(tensors["chunks"].tolist()):
        stop = start + fresh
        layer.update(keys[:, :, start:stop], tensors["v"][None, :, start:stop])
        output = layer.attend(query[:, :, start:stop], width**-0.5)[0].transpose(0, 1).flatten(1)
        require(
            torch.allclose(output, tensors["out"][start:stop], atol=1e-5),
            f"step {call}: out is off by up to {(output - tensors['out'][start:stop]).abs().max()}",
        )
        same_cascade(case, call, layer)
        start = stop


def policy_of(case: Case) -> Cascading:
    """The recorded parameters."""
    params = case.params
    reduce: Literal["max", "mean", "median"] = params["head_reduction"]
    return Cascading(
        levels=params["cascades"],
        sink=params["sinks"],
        places=params["window"],
        strides=tuple(params["accept_every"]),
        beta=params["beta"],
        reduce=reduce,
        eager_fill=params["eager_fill"],
        homogeneous=params["homogeneous_heads"],
    )


def same_cascade(case: Case, call: int, layer: HiveLayer) -> None:
    """Every level of every head holds what was recorded, with its score and place in the cache."""
    params, tensors = case.params, case.tensors
    position, level = layer.slots.position[0], levels(case, layer)
    original = params["original_rope_positions"]
    for head in range(position.shape[0]):
        for index in range(params["cascades"]):
            recorded = tensors["positions"][call, head, index]
            real = recorded >= 0
            where = f"step {call}, KV head {head}, level {index}"
            mine = level[head] == index
            held, expected = position[head, mine].tolist(), recorded[real].tolist()
            require(held == expected, f"{where}: kept {held}, recorded {expected}")
            require(
                int(tensors["stored"][call, index]) == len(held), f"{where}: {len(held)} tokens"
            )
            scores = layer.slots["score"][0, head, mine], tensors["scores"][call, head, index][real]
            require(torch.allclose(*scores, atol=1e-5), f"{where}: scores {scores}")
            places = position[head, mine] if original else layer.slots.rank[0, head, mine]
            rotary = tensors["rope_positions"][call, index][real].tolist()
            require(places.tolist() == rotary, f"{where}: places {places}, recorded {rotary}")


def levels(case: Case, layer: HiveLayer) -> Tensor:
    """int64 `[kv_heads, n]`: the level of each slot, -1 for sinks.

    Levels are worked out when the cache is full; until then, filling eagerly, each holds the window
    before that of the level below it.
    """
    slots, params = layer.slots, case.params
    if layer.evicted or not params["eager_fill"]:
        return slots["level"][0].long() - 1
    age = slots.length - 1 - slots.rank[0]
    return torch.where(slots.position[0] < params["sinks"], -1, age // params["window"])
