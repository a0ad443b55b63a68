"""Watching: a prompt is read as ever, and every attention in full layers can be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.attention import attach
from kvhive.cache.handoff import offer
from kvhive.model.forward import forward


@dataclass(frozen=True, eq=False)
class Attention:
    """What a full-attention layer did with a prompt of n tokens.

    layer: its index in the model. queries `[H, n, d]`, keys `[K, n, d]`, values `[K, n, e]`, output
    `[H, n, e]` (before it is projected), in the model's dtype, on its device; query head h reads KV
    head h // (H / K). scale: of the logits.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    scale: float


See = Callable[[Attention], None]


def watch(model: PreTrainedModel, ids: Sequence[int], see: See) -> None:
    """Let the model read the tokens in one step; `see` is called for every full-attention layer, in
    order. Nothing is as large as tokens x tokens. Raises as `attach`.
    """
    facts = attach(model)
    cache = _Watched(config=facts.config)
    cache.full, cache.see = facts.full_layers, see
    forward(model, cache, tensor([list(ids)]))


class _Watched(DynamicCache):
    """The stock cache; keys of full-attention layers carry someone who attends and tells."""

    full: tuple[int, ...]
    see: See

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of the stock cache."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.full:
            keys = offer(keys, _Watcher(layer_idx, keys, values, self.see))
        return keys, values


@dataclass(frozen=True, eq=False)
class _Watcher:
    """Attends in a layer's place, a whole prompt at once."""

    layer: int
    keys: Tensor
    values: Tensor
    see: See

    def check_model(self, config: object) -> None:
        """There is but one."""

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Causal attention `[1, H, n, d]` -> `[1, H, n, e]`; a single row has no padding."""
        grouped = query.shape[1] != self.keys.shape[1]
        out = F.scaled_dot_product_attention(
            query, self.keys, self.values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        self.see(Attention(self.layer, query[0], self.keys[0], self.values[0], out[0], scale))
        return out
