"""What LESS learns: kernels by which a state of constant size stands for the tokens evicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.budget import Budget
from kvhive.cache.attention import attach
from kvhive.cache.hive_cache import make_layers
from kvhive.calibration import Profile
from kvhive.kernels import Ask
from kvhive.kernels.low_rank import FeatureMaps, answer, summed
from kvhive.kernels.segments import merge, segment
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.learning.picture import Picture
from kvhive.learning.residual import output_projections
from kvhive.learning.watching import Attention, watch
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from kvhive.spec import knob
from kvhive.step import Step
from kvhive.stores.dense import Dense
from kvhive.stores.less import METHOD, SHAPES

_SHOWN = 8  # epochs of the curve
_QUIET = 1e-4  # gains to begin with: the state is nearly silent
_VALIDATED = 10  # one piece in so many is kept apart


@CALIBRATIONS.register(METHOD)
@dataclass(frozen=True)
class LessCalibration(Calibration):
    """Train the kernels of every layer, each by itself, to undo what eviction does to attention.

    Of every piece, prompts of several lengths are evicted from as a cache does it, by `policy` at
    one of the `budgets`; the tokens after each read what is kept and the state of all that went.
    Wanted is what attention to everything gives, behind the output projection: the mean squared
    error is that of eviction alone at first. Adam; the rate is halved four times; of all epochs,
    the one counts that does best on the pieces kept apart.

    Source: arXiv:2402.09398; what is changed says the card.
    """

    source: ClassVar[str] = "arXiv:2402.09398"

    pieces: int = knob(64, "most pieces of text that are read", least=2)
    tokens: int = knob(1024, "length of a piece, in tokens", least=64)
    rank: int = knob(8, "features of a token; the state costs as much as so many tokens", least=1)
    hidden: int = knob(28, "hidden units of every map", least=1)
    policy: str = knob("h2o", "policy that evicts")
    budgets: tuple[float, ...] = knob(
        (0.05, 0.1), "shares of a prompt that are kept, in turn", least=0.001, most=0.99
    )
    prompts: int = knob(3, "prompts that are cut from a piece", least=1)
    scored: int = knob(64, "tokens after each prompt that read what is left", least=1)
    epochs: int = knob(30, "how often all pieces are gone through", least=1)
    rate: float = knob(0.005, "of learning, at first", least=1e-6, most=1.0)
    dropout: float = knob(0.0, "share of the hidden units dropped in training", least=0, most=0.9)
    layers: int = knob(10, "layers learnt at a time: so often are the texts read", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts + self.scored >= self.tokens:
            raise ValueError(
                f"less: scored must leave a prompt of the {self.tokens} tokens of a piece, got "
                f"{self.scored}"
            )
        self._recipe(1.0, self.tokens)

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """See the base; what the tensors are says `stores/less.py`."""
        if len(texts) < 2:
            raise ValueError(
                f"less learns from one piece of {self.tokens} tokens and is judged on another, got "
                "one alone; give longer texts or more of them"
            )
        facts = attach(model)
        places = range(len(facts.full_layers))
        missing = [place for place in places if kept.get(str(place)) is None]
        projections = output_projections(model)
        done = len(places) - len(missing)
        tick(done / len(places))
        for first in range(0, len(missing), self.layers):
            group = missing[first : first + self.layers]
            episodes = self._episodes(model, texts, [facts.full_layers[place] for place in group])
            for place in group:
                index = facts.full_layers[place]
                learnt = self._train(episodes.pop(index), projections[index].float(), place)
                kept.put(str(place), learnt)
                done += 1
                tick(done / len(places))
        layers = [kept.parts[str(place)] for place in places]
        return {name: torch.stack([one[name] for one in layers]) for name in SHAPES}

    @classmethod
    def pictures(cls, profile: Profile) -> tuple[Picture, ...]:
        """The loss curve of every layer."""
        profile.check_tensors(SHAPES)
        curve = profile.tensors["curve"].float()
        epochs = sorted({round(x) for x in torch.linspace(0, curve.shape[1] - 1, _SHOWN).tolist()})
        meaning = (
            "error of a layer's attention on the pieces kept apart, as a share of what it is "
            f"without the state, by epoch; the best counts (mean {float(curve.amin(1).mean()):.3f})"
        )
        titles = tuple(f"epoch {epoch}" for epoch in epochs)
        return (Picture(meaning, titles, curve[:, epochs], ".3f"),)

    def _recipe(self, share: float, length: int) -> Recipe:
        free = Recipe.parse(f"{self.policy}@{self.tokens}+less")
        tokens = max(round(share * length), free.policy.sizing.least)
        return replace(free, budget=Budget(tokens=tokens))

    def _lengths(self) -> list[int]:
        """Of the prompts."""
        longest = self.tokens - self.scored
        return [longest * (place + 1) // self.prompts for place in range(self.prompts)]

    @torch.no_grad()
    def _episodes(
        self, model: PreTrainedModel, texts: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, list[_Episodes]]:
        """By layer, of all pieces."""
        rotations = attach(model).rotations or {}
        found: dict[int, list[_Episodes]] = {layer: [] for layer in layers}
        for place, ids in enumerate(texts):

            def see(one: Attention, place: int = place) -> None:
                if one.layer in found:
                    cut = self._cut(one, place, rotations.get(one.layer))
                    found[one.layer].append(cut)

            watch(model, ids, see)
        return found

    def _cut(self, one: Attention, place: int, written: Rotation | None) -> _Episodes:
        """The prompts of the piece at `place`, each evicted from and then read by what follows."""
        lengths = self._lengths()
        keys, values = one.keys[None], one.values[None]
        dropped = torch.zeros(len(lengths), *keys.shape[1:3], dtype=torch.bool)
        sparse = []
        for turn, length in enumerate(lengths):
            recipe = self._recipe(self.budgets[(turn + place) % len(self.budgets)], length)
            layer = make_layers(replace(recipe, store=Dense()), [None], [written])[0]
            layer.update(keys[:, :, :length], values[:, :, :length])
            layer.attend(one.queries[None, :, :length], one.scale)
            stop = length + self.scored
            more = [held[:, :, length:stop] for held in (keys, values)]
            near = [torch.cat(pair, 2) for pair in zip(layer.store.view(), more, strict=True)]
            held = layer.slots.valid
            seen = torch.cat([held, held.new_ones(*held.shape[:2], self.scored)], 2)
            ask = Ask(Step.plain(length, self.scored), one.scale, valid=seen)
            sparse.append(segment(one.queries[None, :, length:stop], near[0], near[1], ask))
            dropped[turn, :, :length] = True
            for head, held_by in enumerate(layer.positions[0]):
                dropped[turn, head, held_by[held_by >= 0].long()] = False
        spans = [slice(length, length + self.scored) for length in lengths]
        return _Episodes(
            keys=one.keys.cpu().clone(),
            values=one.values.cpu().clone(),
            dropped=dropped,
            queries=torch.stack([one.queries[:, span] for span in spans]).cpu(),
            sparse=torch.cat([out for out, _ in sparse]).to(one.output.dtype).cpu(),
            lse=torch.cat([lse for _, lse in sparse]).cpu(),
            wanted=torch.stack([one.output[:, span] for span in spans]).cpu(),
        )

    @torch.enable_grad()
    def _train(self, pieces: list[_Episodes], projection: Tensor, place: int) -> dict[str, Tensor]:
        """One layer: weights in float16, and the curve, float32 `[epochs]`."""
        chance = torch.Generator().manual_seed(place)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
        apart = [pieces[i].on(projection) for i in order[: -(-len(pieces) // _VALIDATED)]]
        read = [pieces[i].on(projection) for i in order[len(apart) :]]
        scale = sum(float(one.alone(projection)) for one in read) / len(read)
        alone = sum(float(one.alone(projection)) for one in apart)
        weights = [w.to(projection.device).requires_grad_() for w in self._start(read[0], chance)]
        maps = FeatureMaps(*weights)
        adam = torch.optim.Adam(weights, self.rate)
        fade = torch.optim.lr_scheduler.StepLR(adam, max(1, -(-self.epochs // 5)), 0.5)
        best, curve = math.inf, []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(place)
            for _ in range(self.epochs):
                for i in torch.randperm(len(read), generator=chance).tolist():
                    adam.zero_grad()
                    (read[i].error(maps, projection, self.dropout) / scale).backward()
                    adam.step()
                fade.step()
                with torch.no_grad():
                    left = sum(float(one.error(maps, projection)) for one in apart)
                curve.append(left / alone if alone else 1.0)
                if curve[-1] < best:
                    best = curve[-1]
                    learnt = {n: w.detach().cpu().half() for n, w in _named(maps)}
        return learnt | {"curve": torch.tensor(curve)}

    def _start(self, one: _Episodes, chance: torch.Generator) -> Iterator[Tensor]:
        """The weights to begin with, as the source has them."""
        query_heads, width = one.queries.shape[1], one.queries.shape[-1]
        heads = one.keys.shape[0]
        hidden, rank = self.hidden, self.rank
        for of in (query_heads, heads):
            yield _uniform((of, width, hidden), chance)
            yield _uniform((of, hidden, rank), chance)
        yield _uniform((heads, rank, rank), chance)
        yield torch.full((heads, rank), _QUIET)
        yield torch.full((heads, rank), _QUIET)


@dataclass(frozen=True, eq=False)
class _Episodes:
    """One layer's part of one piece, in the model's dtype: p prompts, and s tokens after each.

    keys `[K, n, d]`, values `[K, n, e]` of the piece; dropped bool `[p, K, n]`, what was evicted;
    queries `[p, H, s, d]`; sparse `[p, H, s, e]` and lse `[p, H, s]`, what they get from the tokens
    that are left; wanted `[p, H, s, e]`, what they get from all.
    """

    keys: Tensor
    values: Tensor
    dropped: Tensor
    queries: Tensor
    sparse: Tensor
    lse: Tensor
    wanted: Tensor

    def on(self, like: Tensor) -> _Episodes:
        """The same in float32 where `like` is, to be trained with."""
        moved = {name: value.to(like.device) for name, value in vars(self).items()}
        wide = {name: v.to(like.dtype) for name, v in moved.items() if v.is_floating_point()}
        return _Episodes(**moved | wide)

    def error(self, maps: FeatureMaps, projection: Tensor, dropout: float = 0.0) -> Tensor:
        """Mean squared error behind the projection `[hidden state, H * e]`, with the state."""
        state = summed(maps.of_keys(self.keys[None], dropout), self.values[None], self.dropped)
        rest = answer(maps.of_queries(self.queries, dropout), *state)
        return self._error(merge([(self.sparse, self.lse), rest])[0], projection)

    def alone(self, projection: Tensor) -> Tensor:
        """The same without the state."""
        return self._error(self.sparse, projection)

    def _error(self, out: Tensor, projection: Tensor) -> Tensor:
        off = (out - self.wanted).transpose(1, 2).flatten(2) @ projection.T
        return off.square().mean()


def _named(maps: FeatureMaps) -> list[tuple[str, Tensor]]:
    return [(name, getattr(maps, name)) for name in FeatureMaps.names()]


def _uniform(shape: tuple[int, int, int], chance: torch.Generator) -> Tensor:
    """Between plus and minus sqrt(6 / (inputs + outputs))."""
    edge = math.sqrt(6 / (shape[1] + shape[2]))
    return (torch.rand(shape, generator=chance) * 2 - 1) * edge
