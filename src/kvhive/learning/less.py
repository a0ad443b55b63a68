"""What LESS learns: kernels by which a state of constant size stands for the tokens evicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.budget import Budget
from kvhive.cache.attention import attach
from kvhive.cache.hive_cache import make_layers
from kvhive.calibration import Profile
from kvhive.kernels import Ask
from kvhive.kernels.low_rank import FeatureMaps, answer, beside, summed
from kvhive.kernels.segments import segment
from kvhive.learning.base import CALIBRATIONS, Calibration
from kvhive.learning.kept import Kept
from kvhive.learning.picture import Picture
from kvhive.learning.residual import output_projections
from kvhive.learning.watching import Attention, watch
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from kvhive.spec import knob
from kvhive.step import Step
from kvhive.stores.less import METHOD, SHAPES

_SHOWN = 8  # epochs of the curve
_QUIET = 1e-4  # gains to begin with: the state is nearly silent
_VALIDATED = 10  # one piece in so many is kept apart
_SHORTEST = 384  # tokens of a prompt, where pieces are longer


@CALIBRATIONS.register(METHOD)
@dataclass(frozen=True)
class LessCalibration(Calibration):
    """Train the kernels of every layer, each by itself, to undo what eviction does to attention.

    Of every piece a part is a prompt, of any length (their logarithms are spread evenly), which one
    of the `policies` evicts from as it does in a cache, down to one of the `budgets`; the tokens
    after it read what is kept and the state of all that went. Wanted is what attention to
    everything gives, behind the output projection: the loss is the mean squared error. Adam; the
    rate is halved four times; of all epochs, the one counts that does best on the tenth of the
    pieces that is kept apart.

    Source: arXiv:2402.09398; what is changed says the card.
    """

    source: ClassVar[str] = "arXiv:2402.09398"

    pieces: int = knob(48, "most pieces of text that are read", least=2)
    tokens: int = knob(
        4096, "length of a piece, in tokens: the state is read in texts up to there", least=64
    )
    rank: int = knob(8, "features of a token; the state costs as much as so many tokens", least=1)
    hidden: int = knob(28, "hidden units of every map", least=1)
    policies: tuple[str, ...] = knob(
        ("snapkv", "streaming_llm(positions=original)"), "policies that evict, by lot"
    )
    budgets: tuple[float, ...] = knob(
        (0.05, 0.1), "shares of a prompt that are kept, by lot", least=0.001, most=0.99
    )
    scored: int = knob(128, "tokens after a prompt that read what is left", least=1)
    epochs: int = knob(20, "how often all pieces are gone through", least=1)
    rate: float = knob(0.01, "of learning, at first", least=1e-6, most=1.0)
    dropout: float = knob(0.0, "share of the hidden units dropped in training", least=0, most=0.9)
    layers: int = knob(10, "layers learnt at a time: so often are the texts read", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scored > self.tokens // 2:
            raise ValueError(
                f"less: scored must be at most half of the {self.tokens} tokens of a piece, got "
                f"{self.scored}"
            )
        for policy in self.policies:
            Recipe.parse(f"{policy}@{self.tokens}+less")

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
        done = float(len(places) - len(missing))  # layers; reading for one counts as half of it
        tick(done / len(places))
        for first in range(0, len(missing), self.layers):
            group = missing[first : first + self.layers]
            episodes = {facts.full_layers[place]: list[_Episode]() for place in group}
            for number, ids in enumerate(texts):
                self._read(model, ids, number, episodes)
                done += len(group) / 2 / len(texts)
                tick(done / len(places))
            for place in group:
                index = facts.full_layers[place]
                learnt = self._train(episodes.pop(index), projections[index].float(), place)
                kept.put(str(place), learnt)
                done += 0.5
                tick(done / len(places))
        layers = [kept.parts[str(place)] for place in places]
        names = (*FeatureMaps.names(), "curve")
        learnt = {name: torch.stack([one[name] for one in layers]) for name in names}
        return learnt | {"reach": torch.tensor([self.tokens])}

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

    def _case(self, number: int) -> tuple[int, Recipe]:
        """Of the piece of that number: the length of its prompt, and how that is evicted from."""
        chance = Random(number)
        longest = self.tokens - self.scored
        shortest = min(_SHORTEST, longest)
        length = round(shortest * (longest / shortest) ** chance.random())
        policy, share = chance.choice(self.policies), chance.choice(self.budgets)
        recipe = Recipe.parse(f"{policy}@{self.tokens}")
        tokens = max(round(share * length), recipe.policy.sizing.least)
        return length, replace(recipe, budget=Budget(tokens=tokens))

    def _read(
        self,
        model: PreTrainedModel,
        ids: Sequence[int],
        number: int,
        found: dict[int, list[_Episode]],
    ) -> None:
        """Let the model read the piece of that number, and add to what was `found`, by layer."""
        rotations = attach(model).rotations or {}
        length, recipe = self._case(number)

        def see(one: Attention) -> None:
            if one.layer in found:
                written = rotations.get(one.layer)
                found[one.layer].append(_Episode.of(one, length, recipe, written))

        watch(model, ids[: length + self.scored], see)

    @torch.enable_grad()
    def _train(self, pieces: list[_Episode], projection: Tensor, place: int) -> dict[str, Tensor]:
        """One layer: weights in float16, and the curve, float32 `[epochs]`."""
        chance = torch.Generator().manual_seed(place)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
        apart = [pieces[i].on(projection) for i in order[: -(-len(pieces) // _VALIDATED)]]
        read = [pieces[i].on(projection) for i in order[len(apart) :]]
        scale = sum(float(one.alone(projection)) for one in read) / len(read)
        alone = sum(float(one.alone(projection)) for one in apart)
        if not 0 < scale < math.inf or not 0 < alone < math.inf:
            raise ValueError(
                f"less: what eviction loses in layer {place} cannot be learnt (error {scale}); "
                "give longer pieces or smaller budgets, or load the model in another dtype"
            )
        weights = [w.to(projection.device).requires_grad_() for w in self._start(read[0], chance)]
        maps = FeatureMaps(*weights)
        adam = torch.optim.Adam(weights, self.rate)
        fade = torch.optim.lr_scheduler.StepLR(adam, max(1, -(-self.epochs // 5)), 0.5)
        learnt, best, curve = dict[str, Tensor](), math.inf, list[float]()
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
                curve.append(left / alone)
                if curve[-1] < best:
                    best = curve[-1]
                    learnt = {n: w.detach().cpu().half() for n, w in _named(maps)}
        if not learnt:
            raise ValueError(f"less: training of layer {place} diverged; lower rate={self.rate}")
        return learnt | {"curve": torch.tensor(curve).nan_to_num(posinf=1e9, nan=1e9)}

    def _start(self, one: _Episode, chance: torch.Generator) -> Iterator[Tensor]:
        """The weights to begin with, as the source has them."""
        query_heads, width = one.queries.shape[1], one.queries.shape[-1]
        heads = one.keys.shape[1]
        hidden, rank = self.hidden, self.rank
        for of in (query_heads, heads):
            yield _uniform((of, width, hidden), chance)
            yield _uniform((of, hidden, rank), chance)
        yield _uniform((heads, rank, rank), chance)
        yield torch.full((heads, rank), _QUIET)
        yield torch.full((heads, rank), _QUIET)


@dataclass(frozen=True, eq=False)
class _Episode:
    """One layer's part of one piece, in the model's dtype: a prompt of n tokens, and s after it.

    keys `[1, K, n, d]`, values `[1, K, n, e]`; dropped bool `[1, K, n]`, what was evicted; queries
    `[1, H, s, d]`; sparse `[1, H, s, e]` and lse `[1, H, s]`, what they get from the tokens that
    are left; wanted `[1, H, s, e]`, what they get from all.
    """

    keys: Tensor
    values: Tensor
    dropped: Tensor
    queries: Tensor
    sparse: Tensor
    lse: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, one: Attention, length: int, recipe: Recipe, written: Rotation | None) -> _Episode:
        """The first `length` tokens are the prompt. written: how the layer turns its keys."""
        layer = make_layers(recipe, [None], [written])[0]
        queries, keys, values = one.queries[None], one.keys[None], one.values[None]
        layer.update(keys[:, :, :length], values[:, :, :length])
        layer.attend(queries[:, :, :length], one.scale)
        after = [held[:, :, length:] for held in (keys, values)]
        near = [torch.cat(pair, 2) for pair in zip(layer.store.view(), after, strict=True)]
        fresh, held = after[0].shape[2], layer.slots.valid
        seen = torch.cat([held, held.new_ones(*held.shape[:2], fresh)], 2)
        ask = Ask(Step.plain(length, fresh), one.scale, valid=seen)
        sparse, lse = segment(queries[:, :, length:], near[0], near[1], ask)
        position = layer.slots.position.long()
        dropped = torch.ones(1, keys.shape[1], length + 1, dtype=torch.bool, device=keys.device)
        dropped.scatter_(2, position.masked_fill(position < 0, length), False)
        return cls(
            keys=keys[:, :, :length].cpu().clone(),
            values=values[:, :, :length].cpu().clone(),
            dropped=dropped[..., :length].cpu(),
            queries=queries[:, :, length:].cpu().clone(),
            sparse=sparse.to(one.output.dtype).cpu(),
            lse=lse.cpu(),
            wanted=one.output[None, :, length:].cpu().clone(),
        )

    def on(self, like: Tensor) -> _Episode:
        """The same in float32 where `like` is, to be trained with."""
        moved = {name: value.to(like.device) for name, value in vars(self).items()}
        wide = {name: v.to(like.dtype) for name, v in moved.items() if v.is_floating_point()}
        return _Episode(**moved | wide)

    def error(self, maps: FeatureMaps, projection: Tensor, dropout: float = 0.0) -> Tensor:
        """Mean squared error behind the projection `[hidden state, H * e]`, with the state."""
        state = summed(maps.of_keys(self.keys, dropout), self.values, self.dropped)
        rest = answer(maps.of_queries(self.queries, dropout), *state)
        return self._error(beside(self.sparse, self.lse, rest), projection)

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
