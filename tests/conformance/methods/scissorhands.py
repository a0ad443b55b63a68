"""Scissorhands: kept tokens after every step of the paper's policy; the released code by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.policies._parts.endorsement import endorse
from kvhive.policies.scissorhands import Scissorhands
from kvhive.policies.scissorhands_percentile import ScissorhandsPercentile
from kvhive.slots import Slots
from kvhive.step import Step

from ..cases import Case
from ..playing import Player, make_layer, play, require, same_positions


def replay(case: Case) -> None:
    """The paper's policy was recorded step by step, the released code for a prompt."""
    if "logits" in case.tensors:
        replay_paper(case)
    else:
        replay_released(case)


def replay_paper(case: Case) -> None:
    """Compare with the oracle: every head, every step."""
    params = case.params
    policy = Scissorhands(
        history=params["history_window"],
        recent=params["recent"],
        drop=params["drop"],
        threshold=params["threshold"],
    )
    player = Player.of(case, make_layer(policy, params["budget"]))
    for step in play(case, player):
        same_positions(case, step, player.kept)


def replay_released(case: Case) -> None:
    """Compare what every query of the prompt sees, its attention, its output, and what is left."""
    params, tensors = case.params, case.tensors
    policy = ScissorhandsPercentile(
        history=params["history_window"],
        recent=params["recent"],
        start=params["start"],
        keep_fraction=1 - params["percentile"],
    )
    query, keys, values = (tensors[name] for name in "qkv")
    batch, heads, tokens, width = keys.shape
    slots = Slots(batch, heads, policy.columns, policy.counters, keys.device)
    slots.append(Step.plain(0, tokens), tokens)
    scale = width**-0.5
    rows = endorse(policy.rule, slots, slots["endorsed"], query, keys, scale)
    seen = torch.stack([*rows], 2)
    different = (seen != tensors["keep"].bool()).nonzero()
    require(
        not len(different),
        f"step 0: {len(different)} of the visible keys differ, the first at "
        f"(row, head, query, key) {different[:1].tolist()}",
    )
    group = query.shape[1] // heads
    visible, wide = (t.repeat_interleave(group, 1) for t in (seen, keys))
    logits = query @ wide.transpose(-1, -2) * scale
    attention = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    close(attention, tensors["attn"], "attn")
    output = attention @ values.repeat_interleave(group, 1)
    close(output.transpose(1, 2).flatten(2), tensors["out"], "out")
    layer = make_layer(policy, None)
    layer.update(keys, values)
    layer.attend(query, scale)
    same_survivors(case, layer.slots.position, logits)


def same_survivors(case: Case, held: Tensor, logits: Tensor) -> None:
    """The prompt leaves what the recorded rows endorse, by definition."""
    params, keep = case.params, case.tensors["keep"].bool()
    batch, heads, tokens, _ = keep.shape
    group = logits.shape[1] // heads
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    full = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    threshold = full.sort(-1).values[..., int(params["percentile"] * tokens), None]
    votes = (case.tensors["attn"] > threshold).unflatten(1, (heads, group)).any(2)
    endorsed = votes[:, :, -params["history_window"] :].any(2)
    endorsed[..., tokens - params["recent"] :] = True
    for row in range(batch):
        for head in range(heads):
            ours = [position for position in held[row, head].tolist() if position >= 0]
            expected = endorsed[row, head].nonzero().flatten().tolist()
            require(ours == expected, f"step 0, row {row}, KV head {head}: kept {ours}")


def close(ours: Tensor, recorded: Tensor, name: str) -> None:
    """Equal within 1e-5."""
    require(torch.allclose(ours, recorded, atol=1e-5), f"step 0: {name} differs")
