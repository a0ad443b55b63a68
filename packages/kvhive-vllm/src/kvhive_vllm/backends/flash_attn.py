"""vLLM's FlashAttention on GPUs. Experimental: it has not run on one."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvhive_vllm.backends.reporting import Eager, ReportingOnGpu


class HiveFlashAttentionImpl(ReportingOnGpu, FlashAttentionImpl):
    """As vLLM's."""


class HiveFlashAttentionMetadataBuilder(Eager, FlashAttentionMetadataBuilder):
    """As vLLM's."""


class HiveFlashAttentionBackend(FlashAttentionBackend):
    """As vLLM's, but for the implementation and its graphs."""

    @staticmethod
    def get_impl_cls() -> type[HiveFlashAttentionImpl]:
        """Ours."""
        return HiveFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HiveFlashAttentionMetadataBuilder]:
        """Ours."""
        return HiveFlashAttentionMetadataBuilder
