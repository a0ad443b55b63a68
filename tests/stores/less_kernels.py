"""Random kernels of LESS, of ordinary size, so that errors show."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.calibration import Profile
from kvhive.kernels.low_rank import FeatureMaps
from kvhive.model.facts import facts_for


def random_weights(
    *sizes: int, heads: int, kv_heads: int, width: int, rank: int = 8, hidden: int = 12
) -> dict[str, Tensor]:
    """Weights `[*sizes, ...]` by name, float32; sizes: such as the number of layers."""
    shapes = {
        "query_in": (heads, width, hidden),
        "query_out": (heads, hidden, rank),
        "key_in": (kv_heads, width, hidden),
        "key_out": (kv_heads, hidden, rank),
        "key_mix": (kv_heads, rank, rank),
        "key_gain": (kv_heads, rank),
        "mix_gain": (kv_heads, rank),
    }
    assert tuple(shapes) == FeatureMaps.names()
    source = torch.Generator().manual_seed(heads + 7 * rank)
    return {
        name: torch.randn(*sizes, *shape, generator=source) * (0.5 if len(shape) > 2 else 1)
        for name, shape in shapes.items()
    }


def profile_of(
    model: PreTrainedModel | None = None, rank: int = 8, gain: float = 1.0, reach: int = 10_000
) -> Profile:
    """Random kernels of the tiny model, or of the layer that a `Feeder` feeds. gain: of the keys'
    features; 0 leaves the state silent. reach: tokens they were trained on.
    """
    config = None if model is None else model.config
    layers = 1 if config is None else config.num_hidden_layers
    heads = 4 if config is None else config.num_attention_heads
    kv_heads = 2 if config is None else config.num_key_value_heads
    tensors = random_weights(layers, heads=heads, kv_heads=kv_heads, width=8, rank=rank)
    tensors["key_gain"] *= gain
    tensors |= {"curve": torch.ones(layers, 2), "reach": torch.tensor([reach])}
    mark = "" if model is None else facts_for(model).fingerprint
    return Profile("less", mark, "random numbers", "2026-01-01", tensors)
