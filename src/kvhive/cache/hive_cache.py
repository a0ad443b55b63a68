"""HiveCache: carries a recipe out, layer by layer, while transformers runs the model unchanged."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvhive.cache.attention import ModelFacts, attach
from kvhive.cache.layer import HiveLayer
from kvhive.cache.limits import Spread
from kvhive.cache.report import Report
from kvhive.recipe import Recipe


class HiveCache(Cache):
    """A cache for `model.generate(past_key_values=...)` that follows a recipe.

    ```python
    cache = kvhive.HiveCache.for_model(model, "buzz@0.4")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
    print(cache.report())
    ```
    """

    def __init__(self, recipe: Recipe, facts: ModelFacts) -> None:
        self.recipe = recipe
        self.facts = facts
        self.positions = facts.positions_for(recipe.policy.positions, recipe.positions)
        rotations = facts.rotations if self.positions == "cache" else None
        layers = facts.stock_layers()
        self.compressed = facts.full_layers
        for place, index in enumerate(self.compressed):
            policy = recipe.policy.for_layer(place, len(self.compressed))
            layers[index] = HiveLayer(
                policy=policy,
                budget=recipe.budget if policy.takes_budget else None,
                store=recipe.store,
                spread=self._spread(place),
                rotation=rotations.get(index) if rotations else None,
                slack=recipe.slack,
                written=facts.rotations.get(index) if facts.rotations else None,
            )
        super().__init__(layers=layers)
        if recipe.policy.scope == "model":
            *earlier, last = self.hive_layers()
            last.earlier = earlier
            for layer in earlier:
                layer.waits = True

    @classmethod
    def for_model(cls, model: PreTrainedModel, recipe: Recipe | str) -> HiveCache:
        """An empty cache for `model`, whose attention is switched to kvhive's (other caches still
        work).

        recipe: a `Recipe` or its string, e.g. "buzz@0.4". Raises `ValueError` for a recipe that
        cannot work and for a model that kvhive does not support, naming what is missing.
        """
        return cls(Recipe.parse(recipe), attach(model))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values, `[b, K, q, d]`; return all that the layer holds.

        Raises `ValueError` when the cache was made for another model or batch.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache has {len(self.layers)} layers but was given layer {layer_idx}; a "
                "cache belongs to one model: make a new one"
            )
        held: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return held

    def hive_layers(self) -> list[HiveLayer]:
        """The compressed layers, in order."""
        layers = (self.layers[index] for index in self.compressed)
        return [layer for layer in layers if isinstance(layer, HiveLayer)]

    def report(self) -> Report:
        """Tokens seen and kept, bytes held and what the full cache would hold."""
        used = [layer for layer in self.hive_layers() if layer.seen]
        full = self._stock_bytes()
        for layer in used:
            keys, values = layer.store.keys, layer.store.values
            width = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
            full += keys.shape[0] * keys.shape[1] * layer.seen * width
        return Report(
            recipe=str(self.recipe),
            positions=self.positions,
            layers=tuple(self.compressed),
            seen=used[0].row_seen() if used else torch.zeros(0, dtype=torch.int64),
            kept=torch.stack([layer.slots.count.cpu() for layer in used])
            if used
            else torch.zeros(0, 0, 0, dtype=torch.int64),
            nbytes=self.nbytes,
            full_nbytes=full,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, metadata and spare room included."""
        return self._stock_bytes() + sum(layer.nbytes for layer in self.hive_layers())

    def _stock_bytes(self) -> int:
        stock = [layer for i, layer in enumerate(self.layers) if i not in self.compressed]
        held = [getattr(layer, name, None) for layer in stock for name in ("keys", "values")]
        return sum(t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor))

    def positions_kept(self) -> list[Tensor]:
        """For each compressed layer, int32 `[b, K, n]`: positions of the tokens held, -1 for empty
        slots.
        """
        return [layer.slots.position.cpu() for layer in self.hive_layers()]

    def freeze(self) -> Frozen:
        """Stop evicting, so that a question can be asked without losing any of the document.

        Lasts until `thaw()`; as `with cache.freeze(): ...` until the block ends. What was added
        meanwhile counts towards the budget at the first step after it.
        """
        for layer in self.hive_layers():
            layer.frozen = True
        return Frozen(self)

    def thaw(self) -> None:
        """Evict again from the next step on."""
        for layer in self.hive_layers():
            layer.frozen = False

    def fork(self) -> HiveCache:
        """An independent copy: answer several questions on one document, each from its own copy."""
        return copy.deepcopy(self)

    def make_room(self, tokens: int) -> None:
        """Evict now, so that a turn of `tokens` tokens fits the budget without evicting inside the
        turn.
        """
        if tokens < 0:
            raise ValueError(f"make_room: tokens must be at least 0, got {tokens}")
        for layer in self.hive_layers():
            layer.make_room(tokens)

    def end_recording(self) -> None:
        """After speculative decoding: evict what was postponed and return to ordinary steps."""
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, HiveLayer):
                layer.end_recording()
            elif getattr(layer, "record_past", False):
                layer.crop(0)
                layer.record_past = False

    def _spread(self, place: int) -> Spread:
        recipe, layers = self.recipe, len(self.compressed)
        tokens = None if recipe.budget is None else recipe.budget.tokens
        least = recipe.policy.for_budget(tokens).least_budget

        def spread(budget: int, kv_heads: int) -> Tensor:
            return recipe.allocation.spread(budget, layers, kv_heads, least)[place]

        return spread


class Frozen:
    """Handle of `HiveCache.freeze`: thaws the cache at the end of a `with` block."""

    def __init__(self, cache: HiveCache) -> None:
        self._cache = cache

    def __enter__(self) -> HiveCache:
        return self._cache

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cache.thaw()
