"""How a model turns its keys, found by looking at keys that the model writes itself.

One token is read twice, at two positions. Alone in its cache a token attends to itself only, so its
hidden states do not depend on where it stands, and the two keys of a layer differ by the rotation
alone. Whichever of the model's rotary embeddings explains the difference is the layer's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.rope import Rotation

_FIXED = ("default", "linear", "llama3", "yarn", "proportional")
_NEAR, _FAR = 3, 500
_LAYOUTS: tuple[Literal["halves", "pairs"], ...] = ("halves", "pairs")
_UNKNOWN = "its rotary embedding has a form kvhive does not know"


def find_rotations(
    model: PreTrainedModel, config: PretrainedConfig, layers: tuple[int, ...]
) -> tuple[dict[int, Rotation] | None, str]:
    """The rotation of each of `layers`; layers that write their keys unturned are left out.

    None, and the reason, when there is no rotation that could be turned to another position.
    """
    if reason := cannot_turn(model):
        return None, reason
    candidates = [
        Rotation(frequencies, layout)
        for _, frequencies in _embeddings(model)
        for layout in _LAYOUTS
    ]
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None, _UNKNOWN
    written = _write_keys(model, config)
    found: dict[int, Rotation] = {}
    for layer in layers:
        near, far = written[layer]
        if _close(near, far):
            continue
        fits = [rotation for rotation in candidates if _explains(rotation, near, far)]
        if not fits:
            return None, _UNKNOWN
        found[layer] = fits[0]
    return found, ""


def cannot_turn(model: PreTrainedModel) -> str:
    """Why keys of the model cannot be turned, as far as its modules tell; "" where they may be."""
    kinds = [kind for kind, _ in _embeddings(model)]
    if not kinds:
        return "it has no rotary position embedding"
    changing = [kind for kind in kinds if kind not in _FIXED]
    return f"its rotary embedding changes with length (rope type {changing[0]})" if changing else ""


def _embeddings(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every set of frequencies the model has, radians a position, and the kind it is of."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", "default")
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                layer_type = name.removesuffix("inv_freq").removesuffix("_")
                kind = kinds.get(layer_type, "default") if isinstance(kinds, dict) else kinds
                yield str(kind), buffer.detach()


@torch.no_grad()
def _write_keys(
    model: PreTrainedModel, config: PretrainedConfig
) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer that holds keys: those of one token at `_NEAR` and at `_FAR`, `[K, 1, d]`
    each.
    """
    token = torch.full((2, 1), config.vocab_size // 2, device=model.device)
    position = torch.tensor([[_NEAR], [_FAR]], device=model.device)
    cache = DynamicCache(config=config)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
    finally:
        for module in training:
            module.training = True
    keys = {i: getattr(layer, "keys", None) for i, layer in enumerate(cache.layers)}
    return {i: (key[0], key[1]) for i, key in keys.items() if isinstance(key, Tensor)}


def _explains(rotation: Rotation, near: Tensor, far: Tensor) -> bool:
    """Whether `near`, turned by the distance between the two, is `far`."""
    if 2 * len(rotation.frequencies) > near.shape[-1]:
        return False
    distance = _FAR - _NEAR
    shift = torch.full((1, *near.shape[:2]), distance, device=near.device)
    return _close(rotation.rotate(near[None], shift, distance)[0], far)


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal within a few roundings of their dtype."""
    tolerance = max(1e-3, 4 * torch.finfo(one.dtype).eps)
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())
