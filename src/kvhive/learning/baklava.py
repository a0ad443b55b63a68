"""BaKlaVa: how much every head changes what it is given, and which plan reads a text best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvhive.allocations._importance import best, change, search, tiers
from kvhive.allocations.baklava import METHOD, SHAPES, Baklava
from kvhive.cache.attention import attach
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.inference.driver import Driver
from kvhive.inference.shared_prefill import reads_like_others
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.learning.picture import Picture
from kvhive.learning.residual import layers_watched
from kvhive.learning.watching import Attention, watch
from kvhive.model.facts import ModelFacts
from kvhive.model.forward import forward
from kvhive.recipe import Recipe
from kvhive.spec import knob

_MANY = 10_000  # tokens of a head, so that shares are hardly rounded


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
    policy: str = knob("h2o", "policy that plans are tried with")
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
        read = []
        for place, text in enumerate(texts[:count]):
            part = kept.get(key := f"importance {place}")
            if part is None:
                part = importance(model, text)
                kept.put(key, part)
            read.append(part)
            tick(sum(work[: place + 1]) / sum(work))
        found = {name: torch.stack([one[name] for one in read]) for name in ("heads", "layers")}
        found["kv_heads"] = read[0]["kv_heads"]
        tried = []
        for place, text in enumerate(texts[count:], start=count):
            part = kept.get(key := f"losses {place}")
            if part is None:
                part = {"losses": self._losses(model, facts, found, text)}
                kept.put(key, part)
            tried.append(part["losses"])
            tick(sum(work[: place + 1]) / sum(work))
        return found | self._searched(torch.stack(tried).mean(0))

    @classmethod
    def pictures(cls, profile: Profile) -> tuple[Picture, ...]:
        """Importance of every KV head, and what the plan that was chosen gives it."""
        profile.check_tensors(SHAPES)
        held = profile.tensors
        importance = Baklava().importance(profile)
        part, scale = held["choice"].tolist()
        plan = tiers(importance, _MANY * importance.numel(), 0, None, part, scale) / _MANY
        chosen = (
            f"tokens under the plan that was chosen, as a multiple of the mean: low_frac={part:g}, "
            f"low_scale={scale:g} ({float(held['losses'].min()):.4f} nats a token of the text "
            f"searched on; uniform {float(held['uniform']):.4f}, in proportion "
            f"{float(held['proportional']):.4f})"
        )
        heads = tuple(f"KV head {place}" for place in range(importance.shape[1]))
        return (
            Picture(
                "importance of a KV head times that of its layer; 1 is average", heads, importance
            ),
            Picture(chosen, heads, plan),
        )

    def _searched(self, losses: Tensor) -> dict[str, Tensor]:
        """What the search found. losses: float64, of every plan in the order of `_plans`."""
        by_plan: dict[Baklava, float] = dict(zip(self._plans(), losses.tolist(), strict=True))

        def loss(part: float, scale: float) -> float:
            return by_plan[_tiers(part, scale)]

        grid = self.low_fracs, self.low_scales
        table = search(*grid, loss)
        return {
            "parts": torch.tensor(grid[0], dtype=torch.float64),
            "scales": torch.tensor(grid[1], dtype=torch.float64),
            "choice": torch.tensor(best(table, *grid), dtype=torch.float64),
            **{"losses": table, "uniform": losses[:1], "proportional": losses[-1:]},
        }

    def _plans(self) -> list[Baklava]:
        """Uniform, the rest of the grid, and in proportion."""
        grid = [_tiers(part, scale) for part, scale in product(self.low_fracs, self.low_scales)]
        return [*dict.fromkeys([_tiers(0.0, 1.0), *grid]), Baklava(allocation="proportional")]

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
        prompt = text[:, :first].to(model.device)
        if all(map(reads_like_others, caches)):
            Driver(model).prefill_together(caches, prompt)
        else:
            for cache in caches:
                cache.read(prompt)
        losses = []
        for cache in caches:
            with cache.freeze():
                logits = forward(model, cache, text[:, first:-1], keep=self.scored - 1)[0]
            target = text[0, first + 1 :].to(logits.device)
            losses.append(float(nn.functional.cross_entropy(logits.float(), target)))
        tried = torch.tensor(losses, dtype=torch.float64)
        if not bool(tried.isfinite().all()):
            raise ValueError(
                f"{facts.family} predicts numbers that are not finite; calibrate it in another "
                "dtype, such as float32"
            )
        return tried


def _tiers(part: float, scale: float) -> Baklava:
    """The plan; that of a part of 0 is the same whatever the scale."""
    return Baklava(allocation="tiers", low_frac=part, low_scale=scale if part else 1.0)


def importance(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Tensor]:
    """Of one text: "heads", float64 `[layers, H]`, "layers", float64 `[layers]`, and "kv_heads",
    int64 `[1]`.

    A head is given the value of the token itself, and its output is what comes before the output
    projection; a layer is given the hidden state before its attention, and its output is that with
    attention added. Raises `ValueError` for a model whose attention modules are not found.
    """
    heads, count = [], set()

    def see(one: Attention) -> None:
        given = one.values.repeat_interleave(one.queries.shape[0] // one.values.shape[0], dim=0)
        heads.append(change(given, one.output).cpu())
        count.add(one.values.shape[0])

    with layers_watched(model) as layers:
        watch(model, ids, see)
    if len(count) != 1:
        raise ValueError(
            f"baklava learns of models whose layers have equally many KV heads, got {sorted(count)}"
        )
    return {
        "heads": torch.stack(heads),
        "layers": torch.stack([changed for _, changed in sorted(layers.items())]),
        "kv_heads": torch.tensor(sorted(count)),
    }
