"""Everything that touches transformers: our attention and mask functions, and the facts of a model.

Nothing of transformers is replaced: the two functions are added to its public registries under the
name "kvhive", and a model is told to use that name.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvhive.cache.layer import HANDLE, WAITING, HiveLayer
from kvhive.model.rotation_detection import find_rotations
from kvhive.rope import Rotation

NAME = "kvhive"
_LATENT = ("kv_lora_rank", "kv_lora_dim")


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
    implemented.
    """
    layer: HiveLayer | None = getattr(key, HANDLE, None)
    expected = WAITING.pop()
    if layer is None:
        if expected:
            raise ValueError(
                f"{type(module).__name__} changes the keys between cache and attention, so kvhive "
                "cannot compress them; use the stock cache with this model"
            )
        return _stock_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _refuse_unsupported(module, attention_mask, dropout, kwargs)
    real = None
    if attention_mask is not None:
        real = attention_mask[:, -query.shape[2] :]
        real = None if bool(real.all()) else real
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale, real).transpose(1, 2).contiguous(), None


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
    """transformers' mask contract. Plain causal attention: the 2-D padding mask, or None,
    untouched.

    Causality and eviction are decided where the slots are, so no `[b, 1, q, n]` mask is built;
    other kinds of mask (sliding or chunked layers, which stay stock, and static caches, which hold
    room for tokens to come) are built as for sdpa.
    """
    WAITING.pop()  # a forward begins: what one that failed left behind does not count
    no_spare_room = kv_offset == 0 and kv_length == int(q_offset) + q_length
    if mask_function is causal_mask_function and no_spare_room:
        if attention_mask is not None and bool(attention_mask.all()):
            return None
        return attention_mask
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


_FACTS: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


# ---- facts of a model ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What the cache must know of a model: its layers and their rotary embeddings.

    layers: number of layers. full_layers: indices of the full-attention layers, which are
    compressed; all others stay stock. rotations: how each of those layers turns its keys; a layer
    without rotary positions is not in it. None when the model has none at all that we can turn, and
    then `no_rotation` says why.
    """

    family: str
    config: PretrainedConfig
    full_layers: tuple[int, ...]
    trained_length: int | None
    rotations: Mapping[int, Rotation] | None
    no_rotation: str

    def __deepcopy__(self, memo: object) -> ModelFacts:
        return self

    def stock_layers(self) -> list[Any]:
        """The layers transformers would use for this model, one for each."""
        return list(DynamicCache(config=self.config).layers)

    def positions_for(
        self, rule: Literal["original", "cache"], asked: Literal["original", "cache"] | None
    ) -> Literal["original", "cache"]:
        """The position rule to use: what was asked for, else the policy's where the model allows
        it.

        Raises `ValueError` when "cache" was asked for and the model cannot do it.
        """
        if asked == "cache" and self.rotations is None:
            raise ValueError(
                f"positions='cache' cannot be used with {self.family}: {self.no_rotation}; use "
                "positions='original'"
            )
        return asked or (rule if self.rotations is not None else "original")


def attach(model: PreTrainedModel) -> ModelFacts:
    """Switch the model's attention to kvhive and collect its facts.

    Raises `TypeError` for anything but a transformers model, `ValueError` for a model whose
    attention kvhive cannot serve, naming the reason; such a model is left as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained or kvhive.load"
        )
    config = model.config.get_text_config(decoder=True)
    family = type(model).__name__
    _refuse_family(model.config, config, family)
    before = config._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{family} does not use transformers' attention interface, so its cache cannot be "
            "compressed"
        )
    facts = _FACTS.get(model)
    if facts is None:
        try:
            facts = _FACTS[model] = _collect(model, config, family)
        except ValueError:
            model.set_attn_implementation(before)
            raise
    return facts


def _refuse_family(whole: PretrainedConfig, config: PretrainedConfig, family: str) -> None:
    if any(getattr(config, name, None) for name in _LATENT):
        raise ValueError(
            f"{family} uses latent attention (its cache holds a compressed latent, not keys and "
            "values), which kvhive does not support yet"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{family} caps its attention logits (softcap), which kvhive does not implement"
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(
            f"{family} lets several layers share one cache, which kvhive does not support yet"
        )
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"{family} is an encoder-decoder; kvhive compresses decoder-only models")


def _collect(model: PreTrainedModel, config: PretrainedConfig, family: str) -> ModelFacts:
    stock = DynamicCache(config=config).layers
    full = tuple(i for i, layer in enumerate(stock) if type(layer) is DynamicLayer)
    if not full:
        raise ValueError(
            f"{family} has no full-attention layer: all are sliding, linear or shared, and stay "
            "small by themselves; there is nothing to compress"
        )
    rotations, reason = find_rotations(model, config, full)
    length = getattr(config, "max_position_embeddings", None)
    return ModelFacts(family, config, full, length, rotations, reason)
