"""Play recorded attention logits through a `HiveLayer`, and compare it with what was recorded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvhive.allocations import Allocation
from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.cache.layer import HiveLayer
from kvhive.cache.limits import Limits
from kvhive.cache.progress import Progress
from kvhive.calibration import Profile
from kvhive.policies import Policy
from kvhive.rope import Rotation
from kvhive.stores import StoreKind
from kvhive.stores.dense import Dense

from .cases import Case

TOLERANCE = 1e-4


def make_layer(
    policy: Policy,
    budget: int | None,
    rotation: Rotation | None = None,
    slack: int | None = 0,
    store: StoreKind | None = None,
) -> HiveLayer:
    """A layer that holds every head to `budget` tokens and frees no more than it must.

    None: the policy sizes itself. Budgets that a recipe would refuse are allowed. rotation: how
    keys are turned whose positions are counted in the cache. store: None for a dense one.
    """
    return make_layers(policy, budget, 1, rotation, slack, store=store)[0]


def make_layers(
    policy: Policy,
    budget: int | None,
    count: int,
    rotation: Rotation | None = None,
    slack: int | None = 0,
    allocation: Allocation | None = None,
    profile: Profile | None = None,
    store: StoreKind | None = None,
) -> list[HiveLayer]:
    """The layers of a model, as in a cache. allocation: None for uniform; profile: for it; store:
    None for a dense one.
    """
    policies = [policy.for_layer(place, count, budget) for place in range(count)]
    tokens = None if budget is None else Budget(tokens=budget)
    limits = Limits(policies, tokens, allocation or Uniform(), slack, profile)
    progress = Progress(count, limits)
    layers: list[HiveLayer] = []
    for place, own in enumerate(policies):
        layers.append(HiveLayer(own, store or Dense(), progress, place, layers, rotation))
    return layers


class Player:
    """Feeds a case to a layer so that attention sees exactly the recorded logits.

    Key j is the j-th unit vector, the query of token t is its recorded row of logits and the scale
    is 1: query times key j is the recorded logit, whatever has been evicted meanwhile. Values are
    unit vectors too, so that what comes out is how a token's attention spreads over all positions.
    Kernel, slots, store, policy and eviction all take part. Without logits every query is zero.
    """

    def __init__(self, layer: HiveLayer, kv_heads: int, tokens: int, logits: Tensor | None) -> None:
        self.layer, self.kv_heads = layer, kv_heads
        heads = kv_heads if logits is None else logits.shape[0]
        self.logits = torch.zeros(heads, tokens, tokens) if logits is None else logits.float()
        self.units = torch.eye(tokens)

    @classmethod
    def of(cls, case: Case, layer: HiveLayer) -> Player:
        """For a case with its logits, or without any."""
        return cls(layer, case.facts["kv_heads"], case.facts["n"], case.tensors.get("logits"))

    @property
    def kept(self) -> Tensor:
        """int32 `[kv_heads, kept]`: positions held, in cache order."""
        if not self.layer.is_initialized:
            return torch.empty(self.kv_heads, 0, dtype=torch.int32)
        return self.layer.slots.position[0]

    def advance(self, fresh: int) -> Tensor:
        """Bring the next `fresh` tokens; returns their attention `[heads, fresh, tokens]`."""
        start = self.layer.get_seq_length()
        stop = start + fresh
        keys = self.units[start:stop].expand(1, self.kv_heads, fresh, -1)
        self.layer.update(keys, keys)
        return self.layer.attend(self.logits[None, :, start:stop], 1.0)[0]

    def expected(self, held: Tensor, start: int, stop: int) -> Tensor:
        """Attention of tokens start..stop-1 by definition: softmax over held and new keys."""
        heads, _, tokens = self.logits.shape
        visible = torch.zeros(self.kv_heads, stop - start, tokens + 1, dtype=torch.bool)
        place = torch.where(held < 0, tokens, held.long())  # empty slots: beyond the last token
        visible.scatter_(2, place[:, None, :].expand(-1, stop - start, -1), True)
        visible = visible[..., :tokens]
        visible[:, :, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        visible = visible.repeat_interleave(heads // self.kv_heads, dim=0)
        logits = self.logits[:, start:stop].double().masked_fill(~visible, float("-inf"))
        return logits.softmax(-1)


def play(case: Case, player: Player) -> Iterator[int]:
    """Play all steps; each is handed back by its number once attention and sizes are checked."""
    for step, fresh in enumerate(case.lengths):
        start, held = player.layer.get_seq_length(), player.kept.clone()
        attention = player.advance(fresh)
        require(
            torch.allclose(
                attention.double(), player.expected(held, start, start + fresh), atol=1e-5
            ),
            f"step {step}: attention is not the softmax of the recorded logits of tokens held",
        )
        same_sizes(case, step, held.shape[1] + fresh, player.kept.shape[1])
        yield step


def require(condition: bool, message: str) -> None:
    """Fail with `message` unless `condition`."""
    if not condition:
        raise AssertionError(message)


def same_sizes(case: Case, step: int, before: int, after: int) -> None:
    """Tokens held before and after the step's eviction are as recorded."""
    for name, ours in (("before", before), ("after", after)):
        recorded = case.at(step).get(name, ours)
        require(
            ours == recorded, f"step {step}: {ours} tokens {name} eviction, recorded {recorded}"
        )


def same_positions(case: Case, step: int, ours: Tensor, name: str = "kept") -> None:
    """Every head holds the tokens recorded under `name`."""
    recorded = case.tensor(name, step)
    require(recorded is not None, f"step {step}: nothing is recorded under {name!r}")
    assert recorded is not None
    same_heads(ours, recorded, f"step {step}", name)


def same_heads(ours: Tensor, recorded: Tensor, where: str, name: str = "kept") -> None:
    """Every head holds the tokens recorded, both `[kv_heads, kept]`; -1 stands for no token."""
    for head, (held, expected) in enumerate(zip(ours.tolist(), recorded.tolist(), strict=True)):
        held, expected = ([p for p in side if p >= 0] for side in (held, expected))
        ours_alone = sorted(set(held) - set(expected))
        recorded_alone = sorted(set(expected) - set(held))
        require(
            held == expected,
            f"{where}, KV head {head}: {name} {held}, recorded {expected}; "
            f"ours alone {ours_alone}, recorded alone {recorded_alone}",
        )


def feed(layer: HiveLayer, keys: Tensor, queries: Tensor | None = None) -> Tensor:
    """One step of tokens with these keys `[b, kv_heads, q, d]`, which are their values too.

    queries: `[b, heads, q, d]`, zero if not given. Returns what is held then, int32 `[b, kv_heads,
    n]`.
    """
    layer.update(keys, keys)
    layer.attend(torch.zeros_like(keys) if queries is None else queries, keys.shape[-1] ** -0.5)
    return layer.slots.position


def same_numbers(case: Case, step: int, ours: Tensor, name: str) -> None:
    """Numbers are those recorded under `name`, within 1e-4 relative or absolute, if any are."""
    recorded = case.tensor(name, step)
    if recorded is None:
        return
    shapes = tuple(ours.shape), tuple(recorded.shape)
    require(shapes[0] == shapes[1], f"step {step}: {name} has shape {shapes[0]}, not {shapes[1]}")
    off = (ours - recorded).abs()
    close = off <= TOLERANCE + TOLERANCE * recorded.abs()
    worst = float(off.max()) if off.numel() else 0.0
    require(bool(close.all()), f"step {step}: {name} is off by up to {worst:.2e}")
