"""BaKlaVa: how much every head changes what it is given, and which plan reads a text best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.allocations._importance import best, change, search
from kvhive.allocations.baklava import METHOD, Baklava
from kvhive.cache.attention import attach
from kvhive.cache.handoff import offer
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.inference.driver import Driver
from kvhive.kernels import Ask, attend
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.model.facts import ModelFacts
from kvhive.model.forward import forward
from kvhive.recipe import Recipe
from kvhive.spec import knob
from kvhive.step import Step

Losses = dict[str, list[float]]


@CALIBRATIONS.register(METHOD)
@dataclass(frozen=True)
class BaklavaCalibration(Calibration):
    """Importance of heads and layers over most pieces, then a search on the last ones.

    Of a piece that is searched on all but the last `scored` tokens are read with `policy` at the
    share `budget` under every plan; the loss is that of the last ones, read in one step that evicts
    nothing.

    Source: Gulhan et al. 2025, arXiv:2502.13176, as far as it is known.
    """

    source: ClassVar[str] = "arXiv:2502.13176"

    pieces: int = knob(12, "most pieces of text that are read", least=2)
    tokens: int = knob(1280, "length of a piece, in tokens", least=256)
    searched: int = knob(4, "pieces that plans are tried on, at most half of all", least=1)
    scored: int = knob(256, "tokens at the end of such a piece that are predicted", least=2)
    budget: float = knob(0.25, "share of the tokens that plans keep", least=0.01, most=0.99)
    policy: str = knob("streaming_llm(positions=original)", "policy that plans are tried with")
    low_fracs: tuple[float, ...] = knob(
        (0.0, 0.25, 0.5, 0.75), "parts of the heads that get less", least=0, most=1
    )
    low_scales: tuple[float, ...] = knob(
        (0.1, 0.25, 0.5, 0.75), "what they get, as parts of the mean", least=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scored >= self.tokens:
            raise ValueError(
                f"baklava: scored must be less than the {self.tokens} tokens of a piece, got "
                f"{self.scored}"
            )
        self._recipe(Baklava())

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """See the base; what the tensors are says `allocations/baklava.py`."""
        if len(texts) < 2:
            raise ValueError(
                f"baklava learns from one piece of {self.tokens} tokens and searches on another, "
                "got one alone; give longer texts or more of them"
            )
        facts = attach(model)
        count = len(texts) - min(self.searched, len(texts) // 2)
        work = [1] * count + [4] * (len(texts) - count)  # what a piece costs
        heads, layers = [], []
        for place, text in enumerate(texts[:count]):
            part = kept.get(key := f"importance {place}")
            if part is None:
                part = importance(model, facts, text)
                kept.put(key, part)
            heads.append(part["heads"])
            layers.append(part["layers"])
            tick(sum(work[: place + 1]) / sum(work))
        found = {"heads": torch.stack(heads), "layers": torch.stack(layers)}
        tried = []
        for place, text in enumerate(texts[count:], start=count):
            part = kept.get(key := f"losses {place}")
            if part is None:
                part = {"losses": self._losses(model, facts, found, text)}
                kept.put(key, part)
            tried.append(part["losses"])
            tick(sum(work[: place + 1]) / sum(work))
        return found | self._searched(torch.stack(tried).mean(0))

    def _searched(self, losses: Tensor) -> dict[str, Tensor]:
        """What the search found. losses: float64, of every plan in the order of `_plans`."""
        by_plan: dict[Baklava, float] = dict(zip(self._plans(), losses.tolist(), strict=True))

        def loss(part: float, scale: float) -> float:
            return by_plan[_tiers(part, scale)]

        grid = self.low_fracs, self.low_scales
        table = search(*grid, loss)
        return {
            **{"parts": torch.tensor(grid[0], dtype=torch.float64), "scales": torch.tensor(grid[1], dtype=torch.float64)},
            **{"losses": table, "proportional": losses[-1:]},
            "choice": torch.tensor(best(table, *grid), dtype=torch.float64),
        }

    def _plans(self) -> list[Baklava]:
        """Uniform, the grid and, beside it, in proportion; each once."""
        grid = [_tiers(part, scale) for part, scale in product(self.low_fracs, self.low_scales)]
        return [*dict.fromkeys(grid), Baklava(allocation="proportional")]

    def _recipe(self, plan: Baklava) -> Recipe:
        return replace(Recipe.parse(f"{self.policy}@{self.budget!r}"), allocation=plan)

    @torch.no_grad()
    def _losses(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        found: dict[str, Tensor],
        ids: Sequence[int],
    ) -> Tensor:
        """float64 `[plans]`: nats a token of the end of a piece under each plan."""
        unknown = self._searched(torch.zeros(len(self._plans())).double())
        profile = Profile(METHOD, facts.fingerprint, "", "", found | unknown)
        caches = [HiveCache(self._recipe(plan), facts, profile) for plan in self._plans()]
        text = torch.tensor([list(ids)])
        first = len(ids) - self.scored
        Driver(model).prefill_together(caches, text[:, :first].to(model.device))
        losses = []
        for cache in caches:
            with cache.freeze():
                logits = forward(model, cache, text[:, first:-1], keep=self.scored - 1)[0]
            target = text[0, first + 1 :].to(logits.device)
            losses.append(float(nn.functional.cross_entropy(logits.float(), target)))
        return torch.tensor(losses, dtype=torch.float64)


def _tiers(part: float, scale: float) -> Baklava:
    """The plan; that of a part of 0 is the same whatever the scale."""
    return Baklava(allocation="tiers", low_frac=part, low_scale=scale if part else 1.0)


# ---- importance ---------------------------------------------------------------------------------


def importance(model: PreTrainedModel, facts: ModelFacts, ids: Sequence[int]) -> dict[str, Tensor]:
    """Of one text: "heads", float64 `[layers, H]`, and "layers", float64 `[layers]`.

    A head's input is the value of the token itself, its output what comes before the output
    projection; a layer's are the hidden state before its attention and after it is added. Raises
    `ValueError` for a model whose attention modules are not found.
    """
    cache = _Listening(facts)
    with _watched(model, facts) as layers:
        forward(model, cache, torch.tensor([list(ids)]))
    return {
        "heads": torch.stack([cache.heads[index] for index in facts.full_layers]),
        "layers": torch.stack([layers[index] for index in facts.full_layers]),
    }


class _Listening(DynamicCache):
    """A full cache that compares what heads are given with what they make of it."""

    def __init__(self, facts: ModelFacts) -> None:
        super().__init__(config=facts.config)
        self.facts = facts
        self.heads: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention finds what compares, in place of the layer."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.facts.full_layers:
            return keys, values
        return offer(keys, _Compared(keys, values, layer_idx, self.heads)), values


@dataclass(frozen=True, eq=False)
class _Compared:
    """Attends to a whole prompt, and notes the importance of each query head."""

    keys: Tensor
    values: Tensor
    layer: int
    heads: dict[int, Tensor]

    def check_model(self, config: object) -> None:
        """It is."""

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Causal attention `[1, H, n, d]` -> `[1, H, n, e]`."""
        out, _ = attend(query, self.keys, self.values, Ask(Step.plain(0, query.shape[2]), scale))
        given = self.values.repeat_interleave(query.shape[1] // self.values.shape[1], dim=1)
        self.heads[self.layer] = change(given[0], out[0]).cpu()
        return out


@contextmanager
def _watched(model: PreTrainedModel, facts: ModelFacts) -> Iterator[dict[int, Tensor]]:
    """Meanwhile notes the importance of each compressed layer, float64 `[]`, when it is run."""
    noted: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}
    hooks = []
    for index, block, attention in _blocks(model, facts):

        def enter(_: nn.Module, given: tuple[Any, ...], named: Any, index: int = index) -> None:
            entering[index] = named["hidden_states"] if "hidden_states" in named else given[0]

        def leave(_: nn.Module, given: Any, out: Any, index: int = index) -> None:
            before = entering.pop(index)[0]
            added = (out[0] if isinstance(out, tuple) else out)[0]
            noted[index] = change(before, before.double() + added.double()).cpu()

        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(attention.register_forward_hook(leave))
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: PreTrainedModel, facts: ModelFacts) -> list[tuple[int, nn.Module, nn.Module]]:
    """(index, the block, its attention) of every compressed layer, by transformers' own names."""
    found = {
        module.layer_idx: (model.get_submodule(name.rpartition(".")[0]), module)
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
    }
    if missing := set(facts.full_layers) - set(found):
        raise ValueError(
            f"{facts.family} has no attention module that says it is of layer {min(missing)}, so "
            "what its layers change cannot be seen"
        )
    return [(index, *found[index]) for index in facts.full_layers]
