"""SnapKV: scores and kept tokens after a prompt, in three implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.policies.snapkv import SnapKV

from ..cases import Case
from ..playing import TOLERANCE, Player, feed, make_layer, require, same_heads


def replay(case: Case) -> None:
    """Compare with `SnapKVCluster` by query head or by KV head, or with `SnapKVPress`."""
    policy, recorded = policy_of(case), case.tensors["kept_sorted"]
    layer = read(case, make_layer(policy, recorded.shape[-1]))
    same_heads(layer.slots.position[0], case.tensors["kept_sorted_low_tie"], "step 0")
    clear = case.tensors["boundary_gap"] > 0
    same_heads(layer.slots.position[0][clear], recorded[clear], "step 0, no tie")
    same_scores(case, policy)


def policy_of(case: Case) -> SnapKV:
    """The recorded parameters; a head of its own for every query head is a group of one."""
    params = case.params
    return SnapKV(
        window=params["window_size"],
        kernel=params["kernel_size"],
        pooling=params.get("pooling", "avgpool").removesuffix("pool"),
        group_reduce=params.get("gqa_score_agg", "mean"),
    )


def read(case: Case, layer: HiveLayer) -> HiveLayer:
    """Feed the prompt: queries and keys, or logits that give the window its recorded attention."""
    tensors = case.tensors
    if "window_attention" not in tensors:
        feed(layer, tensors["k"][None], tensors["q"][None])
        return layer
    logits = logits_of(tensors["window_attention"])
    Player(layer, tensors["scores"].shape[0], logits.shape[-1], logits).advance(logits.shape[-1])
    return layer


def logits_of(attention: Tensor) -> Tensor:
    """float32 `[heads, n, n]` whose last rows have the recorded softmax `[heads, window, past]`.

    What is left to one goes to the window itself, in equal parts.
    """
    heads, window, past = attention.shape
    logits = torch.zeros(heads, past + window, past + window)
    left = (1 - attention.double().sum(-1)).clamp_min(1e-30) / torch.arange(1, window + 1)
    logits[:, past:, :past] = attention.double().clamp_min(1e-30).log().float()
    logits[:, past:, past:] = left.log()[..., None].float()
    return logits


def same_scores(case: Case, policy: SnapKV) -> None:
    """The pooled scores of all older tokens, before anything is dropped, are those recorded.

    kvpress and Ada-KV take the mean over the window for the sum; kvpress gives the window a score
    of its own.
    """
    recorded = case.tensors["scores"]
    layer = read(case, make_layer(policy, 10**6))
    older = layer.slots.length - policy.window
    ours = policy.score(layer.slots, layer.held())[0, :, :older]
    if "compression_ratio" in case.params:
        recorded = recorded[:, :older]
        rule = int(layer.slots.length * (1 - case.params["compression_ratio"]))
        kept = case.tensors["kept_sorted"].shape[-1]
        require(kept == rule, f"step 0: {kept} tokens recorded, but the ratio asks for {rule}")
    if "compression_ratio" in case.params or case.method == "adakv":
        ours = ours / policy.window
    worst = float((ours - recorded).abs().max())
    require(worst <= TOLERANCE, f"step 0: scores are off by up to {worst:.2e}")
