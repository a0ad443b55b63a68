"""The worker: the engine's own, whose model runner keeps compressed requests."""

from __future__ import annotations

from typing import Any

import torch
from kvhive.lengths import Lengths
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from kvhive_vllm import backends
from kvhive_vllm.backends.reporting import pages_of
from kvhive_vllm.compression import Compression
from kvhive_vllm.groups import groups_of
from kvhive_vllm.manager import HiveSpec
from kvhive_vllm.memory import Shape, reserve
from kvhive_vllm.refusals import checked_recipe
from kvhive_vllm.rotations import counted_in_cache, rotations_of
from kvhive_vllm.runner_v1 import RunnerV1
from kvhive_vllm.runner_v2 import RunnerV2

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(f"vllm.{__name__}")


class HiveWorker(Worker):
    """Refuses what it cannot run before the model is loaded."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.recipe = checked_recipe(vllm_config)
        backends.register()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """The runner is made here, and becomes one that compresses."""
        super().init_device()
        kind, ours = type(self.model_runner), RunnerV2 if self.use_v2_model_runner else RunnerV1
        self.model_runner.__class__ = type(f"Hive{kind.__name__}", (ours, kind), {})

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Full attention becomes attention whose tokens may go; the scheduler refuses others."""
        needs = self.recipe.policy.needs
        read_anew = -1 if needs.columns or needs.queries else max(1, needs.last_rows)
        return {
            name: HiveSpec.of(spec, read_anew) if type(spec) is FullAttentionSpec else spec
            for name, spec in super().get_kv_cache_spec().items()
        }

    def determine_available_memory(self) -> int:
        """What the engine finds, less what slots and steps need beside blocks."""
        available = int(super().determine_available_memory())
        shape = self._shape()
        aside = reserve(self.recipe, shape, self._turned()).of(available, shape.bytes_a_token)
        logger.info_once(
            "kvhive: %.1f MiB of %.1f MiB are set aside for slots and scratch",
            aside / 2**20,
            available / 2**20,
        )
        return available - aside

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """The cache is there: from now on requests are compressed."""
        super().initialize_from_config(kv_cache_config)
        names = [
            name
            for group in kv_cache_config.kv_cache_groups
            if isinstance(group.kv_cache_spec, HiveSpec)
            for name in group.layer_names
        ]
        self._compress(names, kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def _compress(self, names: list[str], block_size: int) -> None:
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in names]
        rotations = rotations_of(self.model_runner.get_model(), names)
        turned = counted_in_cache(self.recipe, rotations)
        shape = self._shape()
        groups = groups_of(
            self.recipe,
            [pages_of(layer, block_size) for layer in layers],
            [layer.impl.scale for layer in layers],
            rotations,
            turned,
            shape.bytes_a_token // shape.layers,
            shape.tokens,
        )
        device = torch.device(self.device)
        compression = Compression(groups, names, device)
        self.model_runner.compression = compression
        for layer in layers:
            layer.impl.compression = compression
        logger.info_once(
            "kvhive: %s in %d layers, positions counted in the %s%s",
            self.recipe,
            len(names),
            "cache" if turned else "text",
            self._freed(block_size),
        )

    def _freed(self, block_size: int) -> str:
        """What a recipe frees of the longest request, for the log."""
        tokens = self._shape().tokens
        lengths = Lengths(self.recipe)
        lengths.step(tokens)
        before, after = -(-tokens // block_size), -(-lengths.held // block_size)
        return f"; a prompt of {tokens} tokens frees {before - after} of {before} blocks"

    def _turned(self) -> bool:
        wanted = self.recipe.positions or self.recipe.policy.position_rule
        return wanted == "cache"

    def _shape(self) -> Shape:
        config = self.vllm_config
        model, parallel = config.model_config, config.parallel_config
        return Shape(
            layers=model.get_num_layers(parallel),
            heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            width=model.get_head_size(),
            itemsize=model.dtype.itemsize,
            tokens=model.max_model_len,
            requests=config.scheduler_config.max_num_seqs,
        )
