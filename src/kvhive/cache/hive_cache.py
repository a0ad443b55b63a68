"""HiveCache: carries a recipe out, layer by layer, while transformers runs the model unchanged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvhive.cache import speculation
from kvhive.cache.attention import attach
from kvhive.cache.fitting import fitted
from kvhive.cache.footprint import Workload
from kvhive.cache.frozen import Frozen
from kvhive.cache.layer import HiveLayer
from kvhive.cache.limits import Limits
from kvhive.cache.profiles import profile_for
from kvhive.cache.progress import Progress
from kvhive.cache.projections import skipping
from kvhive.cache.report import Report, summary
from kvhive.cache.room import HEADROOM
from kvhive.cache.sharing import SharedLayer, all_layers, holders
from kvhive.calibration import Profile
from kvhive.memory import storage_bytes
from kvhive.model.facts import ModelFacts
from kvhive.model.outline import Outline
from kvhive.model.tokenizers import Tokenizer, remember
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from kvhive.spec import whole


class HiveCache(Cache):
    """A cache for `model.generate(past_key_values=...)` that follows a recipe.

    ```python
    cache = kvhive.HiveCache.for_model(model, "buzz@0.4")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
    print(cache.report())
    ```
    """

    def __init__(self, recipe: Recipe, facts: ModelFacts, profile: Profile | None = None) -> None:
        profile = profile_for(recipe, facts, profile)
        for width in facts.head_widths:
            recipe.store.check_heads(width)
        self.recipe = recipe
        self.facts = facts
        self._warned = False  # of a prompt that came without its second pass
        self.positions = facts.positions_for(recipe.policy.position_rule, recipe.positions)
        self.compressed = facts.full_layers
        sources = recipe.store.sources(len(self.compressed), profile)
        self.holding = tuple(self.compressed[place] for place in holders(sources))
        written = [(facts.rotations or {}).get(index) for index in self.compressed]
        in_cache = self.positions == "cache"
        turns = [rotation if in_cache else None for rotation in written]
        ours = make_layers(recipe, turns, written, profile, sources)
        self.progress = ours[0].progress
        for own in ours:
            own.facts = facts
        if facts.model is not None and (model := facts.model()) is not None:
            self._skipping = skipping(model, set(self.compressed) - set(self.holding))
        layers = facts.stock_layers()
        for index, layer in zip(self.compressed, all_layers(ours, sources), strict=True):
            layers[index] = layer
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        recipe: Recipe | str,
        profile: Profile | str | Path | None = None,
        *,
        fits: int | str | None = None,
        tokens: int | None = None,
        batch: int = 1,
        turn: int = HEADROOM,
    ) -> HiveCache:
        """An empty cache for `model`, whose attention is switched to kvhive's (other caches still
        work).

        recipe: a `Recipe` or its string, e.g. "buzz@0.4". profile: what was learnt about this model
        beforehand, for a recipe that reads it; an object or a file; None: the file that a knob of
        its allocation or store names, or a profile that comes with kvhive. fits: instead of a
        budget, the most bytes the whole cache may hold between two steps ("24MiB"), for `batch`
        rows; the largest budget is taken. tokens: that will be read and written in all; needed
        where layers or a recipe hold what was read without a bound. turn: tokens that a step after
        the prompt brings at most; the default allows for turns of any length, 1 is for one prompt
        and an answer, and leaves the budget larger.

        Raises `ValueError` for a recipe that cannot work, for a model that kvhive does not support,
        naming what is missing, for a profile of another model, and for a size that nothing fits.
        """
        profile = None if profile is None else Profile.of(profile)
        if fits is None and (tokens, batch, turn) != (None, 1, HEADROOM):
            raise ValueError("tokens=, batch= and turn= say what fits= is to hold; give fits= too")
        parsed = Recipe.parse(recipe) if fits is None else Recipe.without_budget(recipe)
        facts = attach(model)
        if fits is not None:
            work = Workload(batch=batch, tokens=tokens, turn=turn)
            outline = Outline.of(model, facts.rotations or ())
            profile = profile_for(parsed, facts, profile)
            parsed = fitted(recipe, fits, outline, work, profile)
        return cls(parsed, facts, profile)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefill_chunk: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Tensor:
        """Let the model read int64 ids `[rows, tokens]` into this cache; float logits
        `[rows, vocabulary]` of the token that comes next.

        What was read can be asked about: `fork()` the cache for every question, and give
        `model.generate` the ids of all of it, those read included.

        attention_mask: `[rows, tokens]`, 0 for padding on the left; in a later call
        `[rows, seen + tokens]`, as `model.generate` takes it. prefill_chunk: read so many tokens at
        a time and evict after each step; None: all at once. tokenizer: the model's, for the words
        of a reconstruction pass; remembered. None: the one that the model was loaded or read with,
        or that lies where it came from; else the pass goes without words.

        Where the policy asks for a reconstruction pass, each step is followed by its own, and only
        then evicted from: until then all of the step and a chunk of the pass are held. Nothing is
        repeated of a single token and in a frozen cache.

        Raises `ValueError` for ids or a mask of another shape, for padding on the right, when the
        model is no longer loaded, and, before anything is read, for a pass that leads beyond the
        length the model was trained on.
        """
        from kvhive.cache.reading import check_reading, prefill  # which know this class

        check_reading(input_ids, attention_mask, self.progress)
        model = self.facts.loaded_model()
        if tokenizer is not None:
            remember(model, tokenizer)
        return prefill(model, self, input_ids, prefill_chunk, attention_mask)

    # ---- what transformers asks of a cache ------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand one layer's new keys and values in, `[b, K, q, d]`; see `HiveLayer.update`.

        Raises `ValueError` when the cache was made for another model or batch, and when its last
        step failed halfway.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache has {len(self.layers)} layers but was given layer {layer_idx}; a "
                "cache belongs to one model: make a new one"
            )
        if layer_idx == self.compressed[0]:
            self._check_stock_layers(key_states.shape[2])
            self._warn_without_pass(key_states.shape[2])
        handed: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return handed

    def _warn_without_pass(self, fresh: int) -> None:
        """Warn, once a cache, when a prompt comes without the second pass its policy asks for."""
        policy, progress = self.recipe.policy, self.progress
        if fresh == 1 or self._warned or policy.reconstruction is None:
            return
        if progress.reading or progress.frozen:
            return
        self._warned = True
        warnings.warn(
            f"{policy.name} goes without its reconstruction pass: model.generate shows a cache no "
            "token ids; read the prompt with cache.read(input_ids) first",
            stacklevel=2,
        )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the newest `-tokens_to_remove` tokens; then count votes and evict as postponed.

        Older releases of transformers pass a tensor. Raises `ValueError` for a positive argument
        and for a crop behind an eviction.
        """
        count = tokens_to_remove
        remove = -whole(
            "crop", "tokens_to_remove", int(count) if torch.is_tensor(count) else count, None
        )
        speculation.crop(self.hive_layers(), remove)
        for layer in self._stock_layers():
            layer.crop(-remove)

    def end_recording(self) -> None:
        """After speculative decoding: evict what was postponed and return to ordinary steps."""
        speculation.crop(self.hive_layers(), 0)
        self.progress.recording = False
        for layer in self._stock_layers():
            if getattr(layer, "record_past", False):
                layer.crop(0)
                layer.record_past = False

    def _check_stock_layers(self, fresh: int) -> None:
        """Raises `ValueError` when a step failed among layers that are not ours."""
        for index, layer in enumerate(self.layers):
            if index in self.compressed or not isinstance(layer, DynamicLayer):
                continue
            expected = self.progress.seen + (fresh if index < self.compressed[0] else 0)
            if layer.get_seq_length() != expected:
                raise ValueError(
                    f"layer {index} of this cache has seen {layer.get_seq_length()} tokens, not "
                    f"{expected}: the last step failed halfway; make a new cache, or call reset()"
                )

    # ---- what is held ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Recipe, tokens seen and kept, bytes, on one line; of a cache in any state."""
        return summary(vars(self).get("recipe", "not set up"), self.report)

    def hive_layers(self) -> list[HiveLayer]:
        """The compressed layers that hold tokens, in order."""
        layers = (self.layers[index] for index in self.holding)
        return [layer for layer in layers if isinstance(layer, HiveLayer)]

    def report(self) -> Report:
        """Tokens seen and kept, bytes held and what the full cache would hold."""
        used = [layer for layer in self.hive_layers() if layer.slots.length]
        full = self._stock_bytes()
        for layer in self._compressed_layers() if used else ():
            full += layer.full_nbytes
        return Report(
            recipe=str(self.recipe),
            positions=self.positions,
            layers=self.holding,
            seen=self.progress.row_seen(used[0].slots.batch)
            if used
            else torch.zeros(0, dtype=torch.int64),
            kept=torch.stack([layer.slots.count.cpu() for layer in used])
            if used
            else torch.zeros(0, 0, 0, dtype=torch.int64),
            nbytes=self.nbytes,
            full_nbytes=full,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, metadata and spare room included."""
        ours = sum(layer.nbytes for layer in self.hive_layers() if layer.slots.length)
        return self._stock_bytes() + ours + (self.progress.nbytes if ours else 0)

    def positions_kept(self) -> list[Tensor]:
        """For each compressed layer, int32 `[b, K, n]`: positions of the tokens held, or of those
        that another layer holds for it; -1 for empty slots.
        """
        return [layer.positions for layer in self._compressed_layers()]

    def _compressed_layers(self) -> list[HiveLayer | SharedLayer]:
        layers = (self.layers[index] for index in self.compressed)
        return [layer for layer in layers if isinstance(layer, HiveLayer | SharedLayer)]

    def _stock_layers(self) -> list[Any]:
        return [layer for i, layer in enumerate(self.layers) if i not in self.compressed]

    def _stock_bytes(self) -> int:
        return storage_bytes([vars(layer) for layer in self._stock_layers()])

    # ---- turns ----------------------------------------------------------------------------------

    def freeze(self) -> Frozen[HiveCache]:
        """Stop evicting, so that a question can be asked without losing any of the document.

        Lasts until `thaw()`, or as `with cache.freeze(): ...` until the block ends; blocks may lie
        in one another. What was added meanwhile counts towards the budget at the first step after.
        """
        self.progress.frozen += 1
        return Frozen(self, self.progress)

    def thaw(self) -> None:
        """Evict again from the next step on, however often the cache was frozen."""
        self.progress.frozen = 0

    def fork(self) -> HiveCache:
        """An independent copy: answer several questions on one document, each from its own copy."""
        return copy.deepcopy(self)

    def make_room(self, tokens: int) -> None:
        """Evict now, so that a turn of `tokens` tokens fits the budget without evicting inside the
        turn. Raises `ValueError` for what is no number of tokens, and while drafts wait for `crop`.
        """
        tokens = whole("make_room", "tokens", tokens)
        if self.progress.recording:
            raise ValueError("make_room: drafts wait for crop(); call end_recording() first")
        for layer in self.hive_layers():
            layer.make_room(tokens)


def make_layers(
    recipe: Recipe,
    turns: list[Rotation | None],
    written: list[Rotation | None] | None = None,
    profile: Profile | None = None,
    sources: Sequence[int] | None = None,
) -> list[HiveLayer]:
    """The layers that carry a recipe out and hold tokens.

    turns: of each compressed layer, how to turn its keys; None where positions are not counted in
    the cache. written: how the model turned the keys it wrote. profile: for an allocation or a
    store that reads one. sources: the place of the layer that each attends to; None: its own.
    """
    count, policy = len(turns), recipe.policy
    places = holders(range(count) if sources is None else sources)
    tokens = None if recipe.budget is None else recipe.budget.tokens
    policies = [policy.for_layer(place, count, tokens) for place in places]
    limits = Limits(
        policies, recipe.budget, recipe.allocation, recipe.slack, profile, recipe.store.best
    )
    progress = Progress(len(places), limits)
    layers: list[HiveLayer] = []
    for own, place in zip(policies, places, strict=True):
        turned, made = turns[place], written[place] if written else None
        here = recipe.store, progress, len(layers), layers
        layers.append(HiveLayer(own, *here, turned, made, profile))
    return layers
