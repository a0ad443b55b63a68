"""vLLM's FlashInfer on GPUs. Experimental: it has not run on one."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)

from kvhive_vllm.backends.reporting import Eager, ReportingOnGpu


class HiveFlashInferImpl(ReportingOnGpu, FlashInferImpl):
    """As vLLM's."""


class HiveFlashInferMetadataBuilder(Eager, FlashInferMetadataBuilder):
    """As vLLM's."""


class HiveFlashInferBackend(FlashInferBackend):
    """As vLLM's, but for the implementation and its graphs."""

    @staticmethod
    def get_impl_cls() -> type[HiveFlashInferImpl]:
        """Ours."""
        return HiveFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[HiveFlashInferMetadataBuilder]:
        """Ours."""
        return HiveFlashInferMetadataBuilder
