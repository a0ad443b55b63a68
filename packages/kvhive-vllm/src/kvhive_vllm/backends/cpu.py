"""vLLM's attention on CPUs."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from kvhive_vllm.backends.reporting import Reporting
from kvhive_vllm.cpu_pages import CpuPages
from kvhive_vllm.pages import Pages


class HiveCpuImpl(Reporting, CPUAttentionBackendImpl):
    """As vLLM's."""

    def pages(self, layer: Any, block_size: int) -> Pages:
        """Of a layer with this implementation, whose cache is there."""
        return CpuPages(layer.kv_cache, block_size, self.writer(layer))


class HiveCpuBackend(CPUAttentionBackend):
    """As vLLM's, but for the implementation."""

    @staticmethod
    def get_impl_cls() -> type[HiveCpuImpl]:
        """Ours."""
        return HiveCpuImpl
