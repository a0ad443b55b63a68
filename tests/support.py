"""Tiny random models, and a way to feed a single layer of the cache, for tests of any kind."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache

from kvhive.cache.hive_cache import HiveCache, make_layers
from kvhive.cache.layer import HiveLayer
from kvhive.cache.speculation import crop
from kvhive.calibration import Profile
from kvhive.recipe import Recipe
from kvhive.rope import Rotation

VOCABULARY = 499
SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,  # ten times the usual: attention is sharp, so that errors show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny_llama(
    seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object
) -> LlamaForCausalLM:
    """A random Llama of two layers, four heads and two KV heads, with transformers' sdpa."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings}, attn_implementation="sdpa"))
    return model.to(dtype).eval()


def tiny(family: str, attention: str = "eager", **settings: object) -> PreTrainedModel:
    """A random model of any family transformers knows: `settings` over the usual tiny sizes."""
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones, int64; no token twice in a row of the batch.

    Twice the same token would have keys of exactly the same length, and no policy could choose
    between them but by rounding.
    """
    source = torch.Generator().manual_seed(seed)
    rows = [
        3 + torch.randperm(VOCABULARY - 3, generator=source)[: shape[-1]]
        for _ in range(math.prod(shape[:-1]))
    ]
    return torch.stack(rows).view(shape)


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids, each `[length]`, as one batch padded on the left, and its mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


@torch.no_grad()
def read(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    prompt: int,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Logits `[b, n, vocabulary]` of `ids`, the first `prompt` in one step (or chunks), then
    singly.
    """
    sizes = [min(chunk or prompt, prompt - i) for i in range(0, prompt, chunk or prompt)]
    parts, start = [], 0
    for size in [*sizes, *[1] * (ids.shape[1] - prompt)]:
        stop = start + size
        seen = None if mask is None else F.pad(mask, (0, max(0, stop - mask.shape[1])), value=1)
        positions = None if seen is None else (seen[:, :stop].cumsum(1) - 1).clamp_min(0)[:, start:]
        step = model(
            ids[:, start:stop],
            past_key_values=cache,
            attention_mask=None if seen is None else seen[:, :stop],
            position_ids=positions,
        )
        parts.append(step.logits)
        start = stop
    return torch.cat(parts, dim=1)


def stock_logits(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """What the stock cache gives for `read`."""
    return read(model, DynamicCache(config=model.config), ids, prompt)


def divergence(logits: Tensor, reference: Tensor) -> float:
    """The largest KL divergence, in nats, of any position's prediction from the reference."""
    ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).max())


def attached_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model of its own, for `HiveCache.for_model` to switch over."""
    return copy.deepcopy(model)


def kept_sets(cache: HiveCache, row: int = 0) -> list[list[list[int]]]:
    """For each layer and KV head: the positions that row `row` holds, ascending."""
    return [
        [[p for p in head.tolist() if p >= 0] for head in layer[row]]
        for layer in cache.positions_kept()
    ]


class Feeder:
    """Feeds one `HiveLayer` with made-up tokens and remembers all that was written.

    Each row of the batch has a tape of its own, known by its number: token t of tape r has the same
    key, value and query in whatever batch it is fed, so that rows can be compared across batches.
    """

    length = 1000
    heads, kv_heads, width = 4, 2, 8

    def __init__(
        self,
        recipe: Recipe | str,
        tapes: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        rotation: Rotation | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.recipe = Recipe.parse(recipe)
        self.layer = make_layer(self.recipe, rotation, profile)
        drawn = [self._draw(tape) for tape in tapes]
        self.keys, self.values, self.queries = (
            torch.stack(part).to(dtype) for part in zip(*drawn, strict=True)
        )
        self.seen = [0] * len(tapes)

    def _draw(self, tape: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator().manual_seed(tape)
        shape = (self.kv_heads, self.length, self.width)
        keys, values = (torch.randn(shape, generator=source) for _ in range(2))
        queries = 1.5 * torch.randn(self.heads, self.length, self.width, generator=source)
        return keys, values, queries

    def step(self, tokens: int | Sequence[int]) -> Tensor:
        """Feed so many tokens, or so many to each row (shorter rows are padded on the left).

        Returns the attention output `[b, H, q, e]` for them.
        """
        each = [tokens] * len(self.seen) if isinstance(tokens, int) else list(tokens)
        size = max(each)
        real = torch.tensor([[i >= size - count for i in range(size)] for count in each])
        keys, values, queries = (
            torch.stack(
                [
                    F.pad(tape[row][:, seen : seen + count], (0, 0, size - count, 0))
                    for row, (seen, count) in enumerate(zip(self.seen, each, strict=True))
                ]
            )
            for tape in (self.keys, self.values, self.queries)
        )
        self.seen = [seen + count for seen, count in zip(self.seen, each, strict=True)]
        self.layer.update(keys, values)
        return self.layer.attend(queries, self.width**-0.5, None if bool(real.all()) else real)

    def take_back(self, tokens: int) -> None:
        """Crop the layer, and wind the tapes back."""
        crop([self.layer], tokens)
        self.seen = [seen - tokens for seen in self.seen]

    def check(self) -> None:
        """Is what is held in order, and as it was written unless the policy merges tokens?

        Keys whose positions are counted in the cache are turned, which changes no length.
        """
        slots = self.layer.slots
        keys, values = self.layer.store.view()
        position, valid = slots.position.long(), slots.valid
        assert self.layer.store.length == slots.length
        if not slots.gaps:
            assert bool((valid[..., 1:] | ~valid[..., :-1]).all()), "empty slots must come first"
        before = position.cummax(-1).values[..., :-1]
        assert bool(((position[..., 1:] > before) | ~valid[..., 1:]).all()), "positions must ascend"
        if self.layer.policy.merges:
            return
        index = position.clamp_min(0)[..., None].expand(*position.shape, self.width)
        written = self.keys.gather(2, index)
        if self.layer.turning.rotation is None:
            same = (keys == written).all(-1)
        else:
            same = (keys.norm(dim=-1) - written.norm(dim=-1)).abs() < 1e-4
        assert bool((same | ~valid).all()), "a slot does not hold its own key"
        same = (values == self.values.gather(2, index)).all(-1)
        assert bool((same | ~valid).all()), "a slot does not hold its own value"


def make_layer(
    recipe: Recipe | str, rotation: Rotation | None = None, profile: Profile | None = None
) -> HiveLayer:
    """The layer a one-layer model would get for `recipe`."""
    return make_layers(Recipe.parse(recipe), [rotation], profile=profile)[0]


class Largest(TorchDispatchMode):
    """Watches every operation and remembers the largest tensor that any of them made."""

    elements = nbytes = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and look at what came out."""
        result = operation(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return result


def tensors(thing: object, known: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object of ours, by its attributes and containers."""
    if id(thing) in known or isinstance(thing, type):
        return
    known.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value, known)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors(value, known)
    elif type(thing).__module__.startswith("kvhive.") and hasattr(thing, "__dict__"):
        yield from tensors(vars(thing), known)


def shown_policy() -> str:
    """The file of the policy that CONTRIBUTING.md walks through."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = page.partition("```python\n")[2].partition("   ```\n")[0]
    return textwrap.dedent(block)
