"""transformers' attention and mask functions for kvhive, and switching a model over to them.

Nothing of transformers is replaced: the two functions are added to its public registries under the
name "kvhive", and a model is told to use that name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvhive.cache.handoff import Attends, layer_of
from kvhive.cache.modes import without_gradient
from kvhive.model.facts import ModelFacts, facts_for, refuse_family

NAME = "kvhive"


# ---- attention and masks ------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query `[b, H, q, d]` -> (output `[b, q, H, e]`, no
    weights).

    Keys that come from a HiveCache are attended in its layer, which evicts afterwards; all others
    go to transformers' own sdpa. Raises `ValueError` for attention features that are not
    implemented, and for a cache of another model.
    """
    layer = layer_of(key)
    if layer is None:
        return _stock_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _refuse_unsupported(module, attention_mask, dropout, kwargs)
    layer.check_model(getattr(module, "config", None))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _attend_untraced if torch.compiler.is_compiling() else _attend
    out = attend(layer, query, scale, attention_mask)
    out = without_gradient(out, query, key, value)
    return out.transpose(1, 2).contiguous(), None


def _attend(layer: Attends, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return layer.attend(query, scale, mask)


# What is held grows and shrinks from step to step: a compiled model leaves its graph here, once.
_attend_untraced = torch.compiler.disable(_attend)


def mask_forward(
    *,
    mask_function: Any,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask contract. Plain causal attention: the 2-D padding mask, or None, cut to
    the tokens seen.

    Causality and eviction are decided where the slots are, so no `[b, 1, q, n]` mask is built;
    other kinds of mask (sliding or chunked layers, which stay stock, and static caches, which hold
    room for tokens to come) are built as for sdpa. Raises `ValueError` for a padding mask that does
    not cover all tokens.
    """
    no_spare_room = kv_offset == 0 and kv_length == int(q_offset) + q_length
    if mask_function is causal_mask_function and no_spare_room:
        return _padding_mask(attention_mask, kv_length)
    mask: Tensor | None = sdpa_mask(
        mask_function=mask_function,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


def _padding_mask(mask: Tensor | None, seen: int) -> Tensor | None:
    if mask is None or mask.dim() != 2:
        return mask
    if mask.shape[1] < seen:
        raise ValueError(
            f"the attention mask has {mask.shape[1]} columns, but {seen} tokens have been fed with "
            "these: give a mask of all of them, those in the cache included"
        )
    return mask[:, :seen]


def _stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa for keys that are not ours; a 2-D padding mask is spelled out for it."""
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} uses s_aux, which sdpa and kvhive do not implement"
        )
    q, n = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < q < n:
        attention_mask = torch.ones(query.shape[0], n, dtype=torch.bool, device=key.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        causal = torch.ones(q, n, dtype=torch.bool, device=key.device).tril(n - q)
        attention_mask = causal & attention_mask[:, None, None, -n:]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _refuse_unsupported(
    module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"{name}: kvhive reads the 2-D padding mask only, got a mask of shape "
            f"{tuple(mask.shape)}; packed sequences and custom masks need the stock cache"
        )
    for feature in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(
                f"{name} uses {feature} in a full-attention layer, which kvhive does not "
                "implement; use the stock cache with this model"
            )
    causal = kwargs.get("is_causal")
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        raise ValueError(
            f"{name} attends to later tokens too; kvhive compresses causal attention only"
        )
    if dropout:
        raise ValueError(
            f"{name} asks for attention dropout {dropout}, which a cache for generation does not "
            "do; call model.eval() first"
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_forward)


# ---- models -------------------------------------------------------------------------------------


def switch(model: PreTrainedModel) -> None:
    """Switch the model's attention to kvhive's. Raises `ValueError` where it has an attention of
    its own.
    """
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its "
            "cache cannot be compressed"
        )


def attach(model: PreTrainedModel) -> ModelFacts:
    """Switch the model's attention to kvhive and collect its facts.

    Raises `TypeError` for anything but a transformers model, `ValueError` for a model whose
    attention kvhive cannot serve, naming the reason; such a model is left as it was, whatever goes
    wrong.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained or kvhive.load"
        )
    refuse_family(model)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    try:
        switch(model)
        facts = facts_for(model)
    except BaseException:
        if config._attn_implementation == NAME != before:
            model.set_attn_implementation(before)
        raise
    return facts
