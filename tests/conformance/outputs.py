"""Replay recorded outputs of an attention layer whose positions are counted inside the cache."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaModel

from kvhive import HiveCache, Recipe
from kvhive.budget import Budget
from kvhive.cache.attention import attach
from kvhive.policies import Policy

from .cases import Case
from .playing import same_numbers, same_positions, same_sizes


def replay_outputs(case: Case, policy: Policy, budget: int) -> None:
    """Run transformers' own attention with the recorded weights; compare outputs and positions."""
    model = recorded_model(case)
    recipe = Recipe(policy, Budget(tokens=budget), positions="cache", slack=0)
    cache = HiveCache(recipe, attach(model))
    hidden, start = case.tensors["hidden"], 0
    for step, fresh in enumerate(case.lengths):
        held = cache.positions_kept()[0].shape[-1] if start else 0
        place = torch.arange(start, start + fresh)[None]
        rows = hidden[:, start : start + fresh]
        with torch.no_grad():
            output, _ = model.layers[0].self_attn(
                hidden_states=rows,
                position_embeddings=model.rotary_emb(rows, place),
                attention_mask=None,
                past_key_values=cache,
            )
        kept = cache.positions_kept()[0][0]
        same_numbers(case, step, output, "out")
        same_sizes(case, step, held + fresh, kept.shape[1])
        same_positions(case, step, kept)
        start += fresh


def recorded_model(case: Case) -> LlamaModel:
    """A one-layer Llama whose attention has the recorded projections and rotary base."""
    facts, tensors = case.facts, case.tensors
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=tensors["hidden"].shape[-1],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=facts["q_heads"],
        num_key_value_heads=facts["kv_heads"],
        head_dim=facts["head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["rope_theta"]},
    )
    model = LlamaModel(config).eval()
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    model.layers[0].self_attn.load_state_dict({f"{name}.weight": tensors[name] for name in names})
    return model
