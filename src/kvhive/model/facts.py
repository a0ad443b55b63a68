"""What the cache must know of a model: its layers, its rotary embeddings, and which model it is."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvhive.model.rotation_detection import find_rotations
from kvhive.rope import Rotation

_LATENT = ("kv_lora_rank", "kv_lora_dim")
_SAMPLED = 64  # numbers of each parameter that make a fingerprint
_FINE = 2**14  # smaller parts of them do not count: float16 loses some


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """Facts of one model.

    layers: number of layers. full_layers: indices of the full-attention layers, which are
    compressed; all others stay stock. rotations: how each of those layers turns its keys; a layer
    without rotary positions is not in it. None when the model has none at all that we can turn, and
    then `no_rotation` says why. dtype: of the weights.
    """

    family: str
    config: PretrainedConfig
    full_layers: tuple[int, ...]
    trained_length: int | None
    rotations: Mapping[int, Rotation] | None
    no_rotation: str
    dtype: torch.dtype
    model: weakref.ref[PreTrainedModel] | None = None
    _fingerprint: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFacts:
        """Collect them. Raises `ValueError` for a model whose attention kvhive cannot serve, naming
        the reason.
        """
        config = model.config.get_text_config(decoder=True)
        family = type(model).__name__
        full = full_attention(model)
        rotations, reason = find_rotations(model, config, full)
        length = getattr(config, "max_position_embeddings", None)
        found = family, config, full, length, rotations, reason, model.dtype
        return cls(*found, weakref.ref(model))

    def __deepcopy__(self, memo: object) -> ModelFacts:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None, "_fingerprint": [self.fingerprint]}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and some numbers of all parameters, whatever their dtype.

        Raises `ValueError` when it was never worked out and the model is gone.
        """
        if not self._fingerprint:
            self._fingerprint.append(fingerprint(self.loaded_model()))
        return self._fingerprint[0]

    @property
    def head_widths(self) -> set[int]:
        """Numbers in a head's key in the compressed layers, as the config says."""
        each = getattr(self.config, "per_layer_config", None)
        configs = [self.config] if each is None else [each[i] for i in self.full_layers]
        return {
            getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads
            for one in configs
        }

    def loaded_model(self) -> PreTrainedModel:
        """The model itself. Raises `ValueError` when it is no longer loaded, or was not known to a
        cache that was pickled.
        """
        model = None if self.model is None else self.model()
        if model is None:
            raise ValueError(
                f"the {self.family} this cache was made for is no longer loaded, or the cache was "
                "pickled; call the model yourself: "
                "model(input_ids, past_key_values=cache)"
            )
        return model

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


_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


def full_attention(model: PreTrainedModel) -> tuple[int, ...]:
    """Indices of the full-attention layers. Raises `ValueError` for a model that has none."""
    stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    full = tuple(i for i, layer in enumerate(stock) if type(layer) is DynamicLayer)
    if not full:
        raise ValueError(
            f"{type(model).__name__} has no full-attention layer: all are sliding, linear or "
            "shared, and stay small by themselves; there is nothing to compress"
        )
    return full


def facts_for(model: PreTrainedModel) -> ModelFacts:
    """The facts of a model, collected once, as long as it lives. Raises as `ModelFacts.of`."""
    facts = _KNOWN.get(model)
    if facts is None or facts.config is not model.config.get_text_config(decoder=True):
        facts = _KNOWN[model] = ModelFacts.of(model)
    return facts


def facts_of(config: object) -> ModelFacts | None:
    """The facts of the known model with this very config; None: there is none."""
    return next((facts for facts in _KNOWN.values() if facts.config is config), None)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names, shapes and some numbers of all parameters.

    Numbers are rounded to bfloat16 and to whole parts of 1 / `_FINE`: the same weights have the
    same fingerprint in float32 and bfloat16, and in float16 if they were kept in bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        rounded = (some.bfloat16().float() * _FINE).round() + 0.0  # no negative zero
        digest.update(rounded.cpu().numpy().tobytes())
    return digest.hexdigest()


def refuse_family(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a kind of model that kvhive does not support, naming the reason."""
    config, family = model.config.get_text_config(decoder=True), type(model).__name__
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
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{family} is an encoder-decoder; kvhive compresses decoder-only models")
