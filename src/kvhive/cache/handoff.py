"""How attention finds its layer: the key tensor that `update` returns carries a reference to it.

transformers does not hand the cache to the attention function. An attribute of the tensor is
stateless, works with threads and with several caches and models at once, needs no hooks, and is
traced by torch.compile. Anything that can `attend` in a layer's place may be offered.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

HANDLE = "_kvhive_layer"


@runtime_checkable
class Attends(Protocol):
    """What attention finds: a layer, or a group of them."""

    def check_model(self, config: object) -> None:
        """Raises `ValueError` unless this is the config of the model the cache was made for."""

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Attention of the tokens just handed in, `[b, H, q, d]` -> `[b, H, q, e]`."""


def offer(keys: Tensor, layer: Attends) -> Tensor:
    """The new keys `[b, K, q, d]`, with the layer that will attend to them."""
    setattr(keys, HANDLE, layer)
    return keys


def layer_of(keys: Tensor) -> Attends | None:
    """The layer these keys were offered with; None for keys that are not ours."""
    layer: Attends | None = getattr(keys, HANDLE, None)
    return layer
