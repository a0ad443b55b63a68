"""How a model's layers turn their keys, read off vLLM's own rotary modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from torch import Tensor, nn

TRIED = (1, 2, 77, 1000)  # positions at which the module's table must be what frequencies say
CLOSE = 2e-2  # of its cosines and sines, which may be of 16 bits


def rotations_of(model: nn.Module, layers: Sequence[str]) -> list[Rotation | None]:
    """The rotation of each attention layer, by their names; None where a layer has none beside it,
    or one that is more than a turn by a multiple of the position. Layers that share a module share
    its rotation.
    """
    known: dict[int, Rotation | None] = {}
    found = []
    for layer in layers:
        parent = model.get_submodule(layer.rpartition(".")[0])
        rotary = getattr(parent, "rotary_emb", None)
        if id(rotary) not in known:
            known[id(rotary)] = _rotation(rotary)
        found.append(known[id(rotary)])
    return found


def _rotation(rotary: Any) -> Rotation | None:
    try:
        frequencies = rotary._compute_inv_freq(rotary.base)
        table, halves = rotary.cos_sin_cache, rotary.is_neox_style
    except (AttributeError, TypeError, NotImplementedError):
        return None
    if not isinstance(frequencies, Tensor) or not _is_plain(frequencies, table):
        return None
    return Rotation(frequencies.double().cpu(), "halves" if halves else "pairs")


def _is_plain(frequencies: Tensor, table: Tensor) -> bool:
    """Whether a table `[positions, 2 r]` holds the cosines and sines of these turns."""
    tried = torch.tensor([place for place in TRIED if place < len(table)])
    angle = tried.double()[:, None] * frequencies.double().cpu()
    wanted = torch.cat([angle.cos(), angle.sin()], -1)
    found = table[tried.to(table.device)].double().cpu()
    return found.shape == wanted.shape and bool(torch.allclose(found, wanted, atol=CLOSE))


def counted_in_cache(recipe: Recipe, rotations: Sequence[Rotation | None]) -> bool:
    """Whether keys are turned, so that positions are counted inside the cache.

    Raises `ValueError` where that was asked for and nobody knows how they are turned.
    """
    unknown = any(rotation is None for rotation in rotations)
    if recipe.positions == "cache" and unknown:
        raise ValueError(
            f"{recipe}: positions=cache needs to know how this model turns its keys, and "
            "kvhive-vllm does not; write positions=original"
        )
    wanted = recipe.positions or recipe.policy.position_rule
    return wanted == "cache" and not unknown
