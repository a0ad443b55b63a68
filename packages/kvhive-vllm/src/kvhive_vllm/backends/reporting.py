"""What all reporting backends share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kvhive_vllm.compression import Compression


class Reporting:
    """Mixed into an attention implementation of vLLM: after it has attended, policies may look.

    Raises `ValueError` for attention whose probabilities or pages are not what policies take them
    for, when a layer is built.
    """

    compression: Compression | None = None  # once there is a cache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        why = _unserved(self)
        if why is not None:
            raise ValueError(f"kvhive-vllm cannot serve this model: {why}")

    def forward(self, layer: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the engine's own."""
        given = super().forward(layer, query, key, *args, **kwargs)  # type: ignore[misc]
        if self.compression is not None:
            self.compression.look(layer.layer_name, query, key)
        return given


def _unserved(layer: Any) -> str | None:
    """Attributes that all implementations of vLLM have."""
    if layer.alibi_slopes is not None:
        return "ALiBi needs every token at its distance"
    if layer.sliding_window not in (None, -1, (-1, -1)):
        return f"a layer sees a window of {layer.sliding_window} alone"
    if layer.logits_soft_cap:
        return "its logits are capped, which votes do not follow"
    if getattr(layer, "sinks", None) is not None:
        return "attention sinks of its own take part of the attention that votes count"
    if layer.kv_sharing_target_layer_name is not None:
        return "layers attend to what others hold"
    return None
