"""Ada-KV: how many tokens each head keeps, and which, in two implementations."""

from __future__ import annotations

import torch

from kvhive.allocations.ada import Ada
from kvhive.policies._parts.selection import keep_top

from ..cases import Case
from ..playing import make_layers, require, same_heads
from .snapkv import policy_of, read, same_scores


def replay(case: Case) -> None:
    """Compare with `AdaKVCluster` of KVCache-Factory, or with `AdaKVPress`."""
    if "compression_ratio" in case.params:
        replay_press(case)
    else:
        replay_cluster(case)


def replay_cluster(case: Case) -> None:
    """A prompt, scored as SnapKV does; the rounding of the reference."""
    params, tensors, policy = case.params, case.tensors, policy_of(case)
    ada = Ada(params["floor_ratio"], params["normalize"], "reference")
    (layer,) = make_layers(policy, params["max_capacity_prompt"], 1, allocation=ada)
    position = read(case, layer).slots.position[0]
    lengths = (position >= 0).sum(-1)
    require(
        lengths.tolist() == tensors["head_lens"].tolist(),
        f"step 0: heads hold {lengths.tolist()}, recorded {tensors['head_lens'].tolist()}",
    )
    ends = tensors["cu_klen"][1:].tolist()
    require(lengths.cumsum(0).tolist() == ends, f"step 0: heads end at {ends} as recorded")
    same_heads(position, tensors["kept_sorted_low_tie"], "step 0")
    clear = tensors["boundary_gap"] > 0
    same_heads(position[clear], tensors["kept_sorted"][clear], "step 0, no tie")
    same_scores(case, policy)


def replay_press(case: Case) -> None:
    """Scores as given, of several rows; an exact total. What is safe counts the window."""
    params, scores = case.params, case.tensors["scores"]
    ada = Ada(params["alpha_safeguard"], normalize=False)
    kept = int(scores.shape[-1] * (1 - params["compression_ratio"]))
    limits = torch.full(scores.shape[:2], kept)
    (share,) = ada.at_eviction([scores], [limits], 0)
    recorded = case.tensors["kept_count"].tolist()
    require(share.tolist() == recorded, f"step 0: {share.tolist()} kept, recorded {recorded}")
    keep = keep_top(scores, torch.ones_like(scores, dtype=torch.bool), share)
    wrong = int((keep != case.tensors["keep_mask"].bool()).sum())
    require(wrong == 0, f"step 0: {wrong} tokens are kept or dropped otherwise than recorded")
