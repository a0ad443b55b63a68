"""vLLM's attention on CPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from kvhive_vllm.backends.reporting import Reporting
from kvhive_vllm.cpu_pages import CpuPages
from kvhive_vllm.pages import Pages


class HiveCpuImpl(Reporting, CPUAttentionBackendImpl):
    """As vLLM's."""

    def pages(self, layer: Any, block_size: int) -> Pages:
        """Of a layer with this implementation, whose cache is there."""

        def write(keys: Tensor, values: Tensor, slots: Tensor) -> None:
            self.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

        return CpuPages(layer.kv_cache, block_size, write)


class HiveCpuBackend(CPUAttentionBackend):
    """As vLLM's, but for the implementation."""

    @staticmethod
    def get_impl_cls() -> type[HiveCpuImpl]:
        """Ours."""
        return HiveCpuImpl
