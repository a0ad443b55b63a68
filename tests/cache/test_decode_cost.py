"""What a decode step costs that evicts nothing: no question to the device, few operations, and one
way out of a compiled graph for each layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvhive.allocations import Allocation, Facts
from kvhive.budget import Budget
from kvhive.cache.hive_cache import HiveCache
from kvhive.policies import POLICIES, Policy
from kvhive.policies.h2o import H2O
from kvhive.policies.snapkv import SnapKV
from kvhive.policies.streaming_llm import StreamingLLM
from kvhive.recipe import Recipe
from kvhive.stores._ragged import RaggedStore
from tests.contract.recipes import with_budget
from tests.support import left_padded, random_ids, tiny

ROOT = Path(__file__).parents[2]
PROMPT, WARM = 60, 4
ROOMY = with_budget(1000)
ASKING = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


@dataclass(frozen=True)
class Spread(Allocation):
    """Half as much again for every other head, half as much less for its neighbour."""

    def shares(self, facts: Facts, budget: int, floor: int) -> Tensor:
        """Of every layer alike."""
        odd = torch.arange(facts.kv_heads) % 2 == 1
        half = budget - max(budget // 2, floor)
        return torch.where(odd, budget + half, budget - half).expand(facts.layers, -1)


class Watch(TorchDispatchMode):
    """Counts launched operations (views launch nothing), and questions to the device.

    On this machine all tensors lie on the CPU. So those are followed that would lie on a device:
    what the model and the cache hold and all that comes of it. The cache's bookkeeping on the CPU
    is not among them.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.launched = 0
        self.asked: list[str] = []
        self._known = {tensor.untyped_storage()._cdata for tensor in on_device}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it; what comes of a tensor on the device lies there too."""
        result = operation(*args, **(kwargs or {}))
        name = str(operation).rpartition(".")[0]
        followed = any(self._follows(tensor) for tensor in tensors([args, kwargs]))
        if name in ASKING and followed:
            self.asked.append(name)
        if not operation.is_view:
            self.launched += 1
        if followed:
            for tensor in tensors(result):
                self._known.add(tensor.untyped_storage()._cdata)
                self._alive.append(tensor)  # its address is not given to another
        return result

    def _follows(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known


def tensors(held: Any) -> Iterable[Tensor]:
    """All of them within lists and dictionaries."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, list | tuple):
        for one in held:
            yield from tensors(one)
    elif isinstance(held, dict):
        yield from tensors(list(held.values()))


def on_device(model: PreTrainedModel, cache: Cache, step: Any) -> Iterable[Tensor]:
    """What would lie on a GPU beside the model."""
    yield from model.parameters()
    yield from model.buffers()
    yield from tensors(step)
    if isinstance(cache, HiveCache):
        yield from tensors([cache.progress.rows])
        for layer in cache.hive_layers():
            slots = layer.slots
            held = [slots._position, slots._columns, slots.counters, slots.state]
            yield from tensors([*layer.store.view(), *held])


@torch.no_grad()
def watched(model: PreTrainedModel, cache: Cache, padded: bool) -> Watch:
    """A decode step, after a prompt and a few others."""
    rows = [random_ids(PROMPT), random_ids(PROMPT - 7 if padded else PROMPT, seed=1)]
    ids, mask = left_padded(rows)
    model(ids, past_key_values=cache, attention_mask=mask if padded else None)
    for _ in range(WARM):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step: dict[str, Tensor] = {"input_ids": random_ids(2, 1)}
        if padded:
            position = (mask.cumsum(1) - 1)[:, -1:]
            step |= {"attention_mask": mask, "position_ids": position}
        watch = Watch(on_device(model, cache, step))
        with watch:
            model(**step, past_key_values=cache)
    return watch


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("recipe", ROOMY, ids=str)
def test_the_device_is_not_asked(model: PreTrainedModel, recipe: str, padded: bool) -> None:
    """In a batch, once padded or not; where a policy sizes itself it must look at what it holds."""
    cache = HiveCache.for_model(model, recipe)
    watch = watched(model, cache, padded)
    decides = cache.recipe.budget is None and cache.recipe.policy.sizing.alone is not None
    assert decides or not watch.asked


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("policy", [SnapKV(window=8), H2O(recent=4), StreamingLLM()], ids=str)
def test_ragged_heads_do_not_ask_either(
    model: PreTrainedModel, policy: Policy, padded: bool
) -> None:
    cache = HiveCache.for_model(model, Recipe(policy, Budget(tokens=30), Spread(), slack=9))
    watch = watched(model, cache, padded)
    assert all(isinstance(layer.store, RaggedStore) for layer in cache.hive_layers())
    assert not watch.asked


@torch.no_grad()
@pytest.mark.parametrize("policy", [SnapKV(window=8), H2O(recent=4), StreamingLLM()], ids=str)
def test_heads_that_differ_cost_what_they_hold(policy: Policy) -> None:
    """Slots, scores, offsets and headroom included, after a prompt and while decoding."""
    model = tiny("llama", head_dim=64)
    cache = HiveCache.for_model(model, Recipe(policy, Budget(tokens=300), Spread()))
    for step in (random_ids(1, 480), *(random_ids(1, 1, seed=seed) for seed in range(30))):
        model(step, past_key_values=cache)
        held = cache.report().kept.sum()
        assert cache.nbytes <= 1.1 * int(held) * 2 * 64 * 4


def test_a_question_would_be_noticed(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "h2o@24")
    assert watched(model, cache, padded=False).asked


def launched(kind: Callable[[PreTrainedModel], Cache], padded: bool = False) -> float:
    """Operations a layer: what a third layer adds to two."""
    counts = []
    for layers in (2, 3):
        model = tiny("llama", "sdpa", num_hidden_layers=layers)
        counts.append(watched(model, kind(model), padded).launched)
    return counts[1] - counts[0]


QUIET = [
    recipe
    for recipe in ROOMY
    if not POLICIES[recipe.partition("@")[0].partition("(")[0]]().needs.votes
]


@pytest.mark.parametrize("recipe", QUIET, ids=str)
def test_policies_without_votes_launch_no_more_than_the_stock_cache(recipe: str) -> None:
    stock = launched(lambda model: DynamicCache(config=model.config))
    assert launched(lambda model: HiveCache.for_model(model, recipe)) <= stock


def test_votes_cost_a_few_operations() -> None:
    """One for the scale, two conversions, two products, a softmax, a sum, and the score."""
    stock = launched(lambda model: DynamicCache(config=model.config))
    assert launched(lambda model: HiveCache.for_model(model, "h2o@1000")) <= stock + 8


def test_a_compiled_model_leaves_its_graph_once_a_layer() -> None:
    """For `attend`, and nowhere else in the cache; later steps compile nothing anew.

    In a process of its own: what checks types during tests cannot be compiled.
    """
    script = Path(__file__).with_name("compiled_decode.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for recipe, seen in json.loads(run.stdout).items():
        assert seen["frames"][1:] == [seen["frames"][1]] * (len(seen["frames"]) - 1), recipe
        assert seen["places"] == ["attention.py:attention_forward"], recipe
        assert seen["left"] == seen["layers"], recipe
