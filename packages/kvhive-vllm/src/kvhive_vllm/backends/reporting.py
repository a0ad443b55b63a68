"""What all reporting backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from kvhive_vllm.gpu_pages import GpuPages
from kvhive_vllm.pages import Pages, Writer
from kvhive_vllm.refusals import recipe_of

if TYPE_CHECKING:
    from kvhive_vllm.compression import Compression


class Reporting(ABC):
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

    @abstractmethod
    def pages(self, layer: Any, block_size: int) -> Pages:
        """Of a layer with this implementation, whose cache is there."""

    def writer(self: Any, layer: Any) -> Writer:
        """The engine's own, of that layer."""

        def write(keys: Tensor, values: Tensor, slots: Tensor) -> None:
            self.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

        return write


class ReportingOnGpu(Reporting):
    """Of kernels for GPUs."""

    def pages(self: Any, layer: Any, block_size: int) -> Pages:
        """As `Reporting.pages`."""
        return GpuPages(layer.kv_cache, self.head_size, block_size, self.writer(layer))


class Eager:
    """Mixed into a metadata builder of vLLM: where policies look at attention, it is in no CUDA
    graph, since replaying one runs none of our code. vLLM then captures what lies between layers of
    attention.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """As the engine's own for recipes without votes."""
        recipe = recipe_of(vllm_config)
        if recipe is not None and recipe.policy.needs.votes:
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]


def pages_of(layer: Any, block_size: int) -> Pages:
    """The pages of a layer, whose cache is there.

    Raises `ValueError` for attention that does not report.
    """
    if not isinstance(layer.impl, Reporting):
        raise ValueError(
            f"kvhive-vllm does not serve {type(layer.impl).__name__}, which vLLM chose for this "
            "model; ask for --attention-backend FLASH_ATTN, TRITON_ATTN or FLASHINFER"
        )
    return layer.impl.pages(layer, block_size)


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
