"""Attention that reports: one subclass of the engine's own backend a kernel, registered in its
place. What attention gives is the engine's own.
"""

from __future__ import annotations

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

OURS = {
    AttentionBackendEnum.CPU_ATTN: "kvhive_vllm.backends.cpu.HiveCpuBackend",
    AttentionBackendEnum.FLASH_ATTN: "kvhive_vllm.backends.flash_attn.HiveFlashAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: "kvhive_vllm.backends.triton_attn.HiveTritonAttentionBackend",
    AttentionBackendEnum.FLASHINFER: "kvhive_vllm.backends.flashinfer.HiveFlashInferBackend",
}


def register() -> None:
    """Called in a worker's process before any layer is built. An engine without a recipe that was
    there first has left vLLM's own choice in its memory.
    """
    for backend, path in OURS.items():
        register_backend(backend, path)
    selector._cached_get_attn_backend.cache_clear()
