"""vLLM's attention in Triton, for GPUs. Experimental: it has not run on one."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from kvhive_vllm.backends.reporting import Eager, ReportingOnGpu


class HiveTritonAttentionImpl(ReportingOnGpu, TritonAttentionImpl):
    """As vLLM's."""


class HiveTritonAttentionMetadataBuilder(Eager, TritonAttentionMetadataBuilder):
    """As vLLM's."""


class HiveTritonAttentionBackend(TritonAttentionBackend):
    """As vLLM's, but for the implementation and its graphs."""

    @staticmethod
    def get_impl_cls() -> type[HiveTritonAttentionImpl]:
        """Ours."""
        return HiveTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HiveTritonAttentionMetadataBuilder]:
        """Ours."""
        return HiveTritonAttentionMetadataBuilder
