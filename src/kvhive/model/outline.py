"""A model in outline: the shapes of what its cache holds and the bytes of its weights.

Shapes are those that the model itself writes when it reads one token. For a model that is not
loaded that is done on torch's meta device, where tensors have shapes and no memory, so a config is
enough.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvhive.memory import storage_bytes
from kvhive.model.rotation_detection import cannot_turn


@dataclass(frozen=True)
class Shape:
    """One layer's attention: heads of queries and of keys, the width of a key and of a value."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Outline:
    """What a cache's size depends on.

    full_layers: indices of the full-attention layers, which are compressed; turned: those of them
    whose keys can be turned to other positions (for a model that is not loaded: all of them, if its
    rotary embedding has a form that allows it). shapes: of each layer that holds keys and values;
    fixed: bytes a row of each layer that holds anything else, whatever was read. weight_bytes: of
    parameters and buffers; parameters: how many numbers.
    """

    family: str
    config: PretrainedConfig
    full_layers: tuple[int, ...]
    turned: frozenset[int]
    shapes: dict[int, Shape]
    fixed: dict[int, int]
    trained_length: int | None
    parameters: int
    weight_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, turned: Collection[int]) -> Outline:
        """Of a model, on any device. turned: see the class.

        Raises `ValueError` for a model without full-attention layers.
        """
        config = model.config.get_text_config(decoder=True)
        layers = _read_one_token(model, config)
        keyed = {i: layer for i, layer in enumerate(layers) if isinstance(layer, DynamicLayer)}
        full = tuple(i for i, layer in keyed.items() if type(layer) is DynamicLayer)
        if not full:
            raise ValueError(
                f"{type(model).__name__} has no full-attention layer: there is nothing to compress"
            )
        others = {i: layer for i, layer in enumerate(layers) if i not in keyed}
        return cls(
            family=type(model).__name__,
            config=config,
            full_layers=full,
            turned=frozenset(turned),
            shapes={i: _shape(layer, config) for i, layer in keyed.items()},
            fixed={i: storage_bytes(vars(layer).values()) for i, layer in others.items()},
            trained_length=getattr(config, "max_position_embeddings", None),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weight_bytes=storage_bytes([*model.parameters(), *model.buffers()]),
        )

    @classmethod
    def of_config(cls, config: PretrainedConfig, dtype: str) -> Outline:
        """Of a model that is not loaded, as it would be in `dtype`.

        Raises `ValueError` for a model that cannot be laid out without its weights, or cannot be
        compressed.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            model.tie_weights()
            turned = () if cannot_turn(model) else range(config.get_text_config().num_hidden_layers)
            return cls.of(model, turned)
        except ValueError:
            raise
        except Exception as error:  # a damaged config ends in errors of many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"a {config.model_type} model cannot be laid out from its config alone ({reason}); "
                "load it, and use HiveCache.for_model(fits=...)"
            ) from error

    def stock_layers(self) -> dict[int, Any]:
        """Empty layers as transformers makes them, of those that are not compressed."""
        layers = DynamicCache(config=self.config).layers
        return {i: layer for i, layer in enumerate(layers) if i not in self.full_layers}


@torch.no_grad()
def _read_one_token(model: PreTrainedModel, config: PretrainedConfig) -> list[Any]:
    """The layers of transformers' own cache after one token."""
    cache = DynamicCache(config=config)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    return list(cache.layers)


def _shape(layer: DynamicLayer, config: PretrainedConfig) -> Shape:
    keys, values = layer.keys, layer.values
    assert isinstance(keys, Tensor) and isinstance(values, Tensor)
    return Shape(
        heads=max(config.num_attention_heads, keys.shape[1]),
        kv_heads=keys.shape[1],
        key_width=keys.shape[3],
        value_width=values.shape[3],
        dtype=keys.dtype,
    )
