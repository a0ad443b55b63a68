"""Everything that touches transformers: our attention and mask functions, and the facts of a model.

Nothing of transformers is replaced: the two functions are added to its public registries under the
name "kvhive", and a model is told to use that name.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvhive.layer import HANDLE, WAITING, HiveLayer
from kvhive.rope import Rotation

NAME = "kvhive"
_LATENT = ("kv_lora_rank", "kv_lora_dim")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


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
    """transformers' attention contract: query `[b, H, q, d]` -> (output `[b, q, H, e]`, no weights).

    Keys that come from a HiveCache are attended in its layer, which evicts afterwards; all others go to
    transformers' own sdpa. Raises `ValueError` for attention features that are not implemented.
    """
    layer: HiveLayer | None = getattr(key, HANDLE, None)
    expected = WAITING.pop()
    if layer is None:
        if expected:
            raise ValueError(
                f"{type(module).__name__} changes the keys between cache and attention, so kvhive cannot "
                "compress them; use the stock cache with this model"
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
    *, mask_function: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """transformers' mask contract. Plain causal attention: the 2-D padding mask, or None, untouched.

    Causality and eviction are decided where the slots are, so no `[b, 1, q, n]` mask is built; other
    kinds of mask (sliding or chunked layers, which stay stock) are built as for sdpa.
    """
    if mask_function is causal_mask_function:
        if attention_mask is not None and bool(attention_mask.all()):
            return None
        return attention_mask
    mask: Tensor | None = sdpa_mask(
        mask_function=mask_function, attention_mask=attention_mask, **kwargs
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
    q, n = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < q < n:
        attention_mask = torch.ones(query.shape[0], n, dtype=torch.bool, device=key.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        causal = torch.ones(q, n, dtype=torch.bool, device=key.device).tril(n - q)
        attention_mask = causal & attention_mask[:, None, None, -n:]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _refuse_unsupported(
    module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"{name}: kvhive reads the 2-D padding mask only, got a mask of shape {tuple(mask.shape)}; "
            "packed sequences and custom masks need the stock cache"
        )
    for feature in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(
                f"{name} uses {feature} in a full-attention layer, which kvhive does not implement; use "
                "the stock cache with this model"
            )
    causal = kwargs.get("is_causal")
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        raise ValueError(f"{name} attends to later tokens too; kvhive compresses causal attention only")
    if dropout:
        raise ValueError(
            f"{name} asks for attention dropout {dropout}, which a cache for generation does not do; call "
            "model.eval() first"
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_forward)


_FACTS: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


# ---- facts of a model ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What the cache must know of a model: its layers and its rotary embedding.

    layers: number of layers. full_layers: indices of the full-attention layers, which are compressed;
    all others stay stock. rotation: None when the model has no rotary positions we can turn, and then
    `no_rotation` says why.
    """

    family: str
    config: PretrainedConfig
    full_layers: tuple[int, ...]
    trained_length: int | None
    rotation: Rotation | None
    no_rotation: str

    def __deepcopy__(self, memo: object) -> ModelFacts:
        return self

    def stock_layers(self) -> list[CacheLayerMixin]:
        """The layers transformers would use for this model, one for each."""
        layers: list[CacheLayerMixin] = DynamicCache(config=self.config).layers
        return layers

    def positions_for(
        self, rule: Literal["original", "cache"], asked: Literal["original", "cache"] | None
    ) -> Literal["original", "cache"]:
        """The position rule to use: what was asked for, else the policy's where the model allows it.

        Raises `ValueError` when "cache" was asked for and the model cannot do it.
        """
        if asked == "cache" and self.rotation is None:
            raise ValueError(
                f"positions='cache' cannot be used with {self.family}: {self.no_rotation}; use "
                "positions='original'"
            )
        return asked or (rule if self.rotation is not None else "original")


def attach(model: PreTrainedModel) -> ModelFacts:
    """Switch the model's attention to kvhive and collect its facts.

    Raises `TypeError` for anything but a transformers model, `ValueError` for a model whose attention
    kvhive cannot serve, naming the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained or kvhive.load"
        )
    config = model.config.get_text_config(decoder=True)
    family = type(model).__name__
    _refuse_family(config, family)
    if config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{family} does not use transformers' attention interface, so its cache cannot be compressed"
        )
    facts = _FACTS.get(model)
    if facts is None:
        facts = _FACTS[model] = _collect(model, config, family)
    return facts


def _refuse_family(config: PretrainedConfig, family: str) -> None:
    if any(getattr(config, name, None) for name in _LATENT):
        raise ValueError(
            f"{family} uses latent attention (its cache holds a compressed latent, not keys and values), "
            "which kvhive does not support yet"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{family} caps its attention logits (softcap), which kvhive does not implement"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{family} is an encoder-decoder; kvhive compresses decoder-only models")


def _collect(model: PreTrainedModel, config: PretrainedConfig, family: str) -> ModelFacts:
    stock = DynamicCache(config=config).layers
    full = tuple(i for i, layer in enumerate(stock) if type(layer) is DynamicLayer)
    if not full:
        raise ValueError(
            f"{family} has no full-attention layer: all are sliding, linear or shared, and stay small by "
            "themselves; there is nothing to compress"
        )
    rotation, reason = _find_rotation(model, config)
    length = getattr(config, "max_position_embeddings", None)
    return ModelFacts(family, config, full, length, rotation, reason)


def _find_rotation(
    model: PreTrainedModel, config: PretrainedConfig
) -> tuple[Rotation | None, str]:
    """The model's rotary embedding as a `Rotation`, checked against the model's own function."""
    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if not modules:
        return None, "it has no rotary position embedding"
    embedding = modules[0]
    kind = getattr(embedding, "rope_type", "default")
    if not isinstance(kind, str) or kind not in _FIXED_ROPE:
        return None, f"its rotary embedding changes with length (rope type {kind})"
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return None, "its rotary embedding has a form kvhive does not know"
    for layout in ("halves", "pairs"):
        rotation = Rotation(embedding.inv_freq.detach(), layout)  # type: ignore[arg-type]
        if _agrees(rotation, embedding, apply):
            return rotation, ""
    return None, "its rotary embedding has a form kvhive does not know"


@torch.no_grad()
def _agrees(rotation: Rotation, embedding: nn.Module, apply: Any) -> bool:
    """Whether turning a key that the model wrote at position 3 by 37 gives what it writes at 40."""
    width = 2 * len(rotation.frequencies)
    device = embedding.inv_freq.device
    if device.type == "meta":
        return rotation.layout == "halves"
    key = torch.linspace(-1, 1, width, device=device).view(1, 1, 1, width)
    written = []
    for position in (3, 40):
        try:
            cos, sin = embedding(key, torch.tensor([[position]], device=device))
            written.append(apply(key, key, cos, sin)[1])
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
    if written[0].shape != key.shape:
        return False
    shift = torch.full((1, 1, 1), 37, device=device)
    return torch.allclose(rotation.rotate(written[0].float(), shift, 37), written[1].float(), atol=1e-4)
