"""Footprint: the bytes a cache will hold, known before it reads anything.

What a slot takes is measured, not written down a second time: a layer of the very shapes, with one
KV head, reads two made-up prompts, and its bytes are what they are for any batch, heads and length
(they are linear in all three). How many slots there is room for is what `room` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kvhive.allocations.uniform import Uniform
from kvhive.cache import room
from kvhive.cache.eviction import Eviction
from kvhive.cache.late_votes import patience
from kvhive.cache.layer import HiveLayer
from kvhive.cache.limits import UNLIMITED, Limits
from kvhive.cache.positions import bytes_held_twice
from kvhive.cache.profiles import profile_by_shape
from kvhive.cache.progress import Progress
from kvhive.cache.sharing import closing, holders
from kvhive.calibration import Profile
from kvhive.memory import storage_bytes
from kvhive.model.outline import Outline, Shape
from kvhive.policies import Policy
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from kvhive.slots import SHORT_MAX
from kvhive.step import Step
from kvhive.stores import StoreKind

_PROMPTS = (512, 1024)  # what a layer is measured with
PADDED = 8  # at most 1 / PADDED of what uneven heads take is empty: `Plan.uneven`, blocks, slots
_ROW = 64  # bytes that say where one of them lies
_WIDER = torch.int32.itemsize - torch.int16.itemsize  # of a position, once they are large
_TURN = Rotation(torch.ones(1))


@dataclass(frozen=True)
class Workload:
    """What a cache will be asked to hold.

    batch: rows. tokens: read and written in all, at most; None where that is not known. chunk: the
    prompt comes in steps of so many tokens; None: in one. turn: tokens that a later step brings, at
    most: 1 where single tokens are decoded and no more. (By default so many that, within a budget,
    longer turns make no difference.)

    Raises `ValueError` for a number below 1.
    """

    batch: int = 1
    tokens: int | None = None
    chunk: int | None = None
    turn: int = room.HEADROOM

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "chunk", "turn"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def growing(self) -> int:
        """The most tokens that a step brings to a cache that holds some."""
        return max(self.turn, self.chunk or 1)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a whole cache, at most, as long as nothing is frozen and no drafts wait.

    between_steps: at any moment between two steps. while_reading: at any moment of reading a
    prompt: a layer (with a policy that decides for all layers at once: every layer; where layers
    share: those that others still attend to) then holds the step's tokens beside what it will keep;
    what the model itself works with is not in it. None where that depends on the number of tokens,
    which is not known. stock: of the layers that are not compressed, in both.
    """

    between_steps: int
    while_reading: int | None
    stock: int


def footprint(
    recipe: Recipe, outline: Outline, work: Workload, profile: Profile | None = None
) -> Footprint:
    """What a cache for `recipe` will hold at most.

    Exact but for: room that an eviction leaves unused, and keys held twice where positions are
    counted in the cache (counted for every token that may be older than a dropped one). A policy
    that shares out among heads is taken at its most uneven. profile: None where the model is not
    loaded: one that fits its shape is looked up. Raises `ValueError` when it depends on
    the number of tokens and that is not given.
    """
    share = recipe.budget is not None and recipe.budget.share is not None
    if work.tokens is None and share:
        raise _unknown(f"{recipe} keeps a share of them")
    profile = profile or profile_by_shape(recipe, outline)
    count = len(outline.full_layers)
    sources = recipe.store.sources(count, profile)
    places = holders(sources)
    indices = [outline.full_layers[place] for place in places]
    shapes = [outline.shapes[index] for index in indices]
    tokens = None if recipe.budget is None else recipe.budget.tokens
    policies = [recipe.policy.for_layer(place, count, tokens) for place in places]
    limits = Limits(policies, recipe.budget, recipe.allocation, recipe.slack, profile)
    limits.follow(Step.plain(0, work.tokens or 2), [work.tokens or 0], shapes[0].kv_heads)
    held, brought = [], []
    for place, (index, shape) in enumerate(zip(indices, shapes, strict=True)):
        turning = _counts_in_cache(recipe, outline) and index in outline.turned
        layer = _Layer(Eviction(policies[place], limits, place), recipe.store, shape, turning)
        held.append(layer.bytes(layer.room(work), work))
        brought.append(layer.bytes(layer.brought(work), work))
    stock = sum(_stock_bytes(outline, index, work) for index in outline.stock_layers())
    steady = stock + sum(held) + _bytes_of_limits(limits, work)
    together = Eviction(policies[0], limits, 0).together
    peak = sum(brought) if together else _at_once(sources, brought)
    return Footprint(steady, steady + peak if all(brought) else None, stock)


def _at_once(sources: Sequence[int], brought: Sequence[int]) -> int:
    """The most of `brought`, one number for each layer that holds tokens, while steps are open."""
    steps = list(zip(closing(sources).items(), brought, strict=True))
    return max(
        sum(most for (first, end), most in steps if first <= place <= end)
        for place in range(len(sources))
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """One compressed layer. turning: whether its keys are turned when others are dropped."""

    eviction: Eviction
    kind: StoreKind
    shape: Shape
    turning: bool

    @property
    def limit(self) -> int | None:
        """The most tokens that heads may hold between two steps, on average; None: all read."""
        limits = self.eviction.limits.of(self.eviction.layer)
        budget = self.eviction.limits.budget
        if limits is None or budget is None or not self.eviction.decoding:
            return None
        most = -(-int(limits.sum()) // limits.numel())
        return None if most >= UNLIMITED else most

    @property
    def uneven(self) -> bool:
        """Whether heads may come to hold different numbers of tokens."""
        limits = self.eviction.limits.of(self.eviction.layer)
        differ = limits is not None and int(limits.min()) < int(limits.max())
        return self.eviction.sharing or differ

    def room(self, work: Workload) -> int:
        """The most slots there is room for between two steps, on average over heads and, where all
        layers compete, over them.
        """
        limit = self.limit
        if self.eviction.sharing and limit is not None:
            limit += room.uneven_headroom(limit)
        slots = room.most(limit, work.tokens, work.growing)
        if slots is None:
            raise _unknown(f"{self.eviction.policy.name} keeps as many as it likes")
        return slots + slots // PADDED if self.uneven else slots

    def brought(self, work: Workload) -> int:
        """The most slots while a prompt is read; 0: nobody knows."""
        if work.chunk is None:
            return work.tokens or 0
        most = self.room(work) + work.chunk
        return min(most, work.tokens or most)

    def bytes(self, slots: int, work: Workload) -> int:
        """Bytes of so many slots of every head, votes that wait and keys held twice included."""
        shape, policy = self.shape, self.eviction.policy
        slot, rest = _measured(policy, self.kind.fullest, shape, self.turning)
        if work.tokens is None or work.tokens > SHORT_MAX:
            slot += _WIDER
        total = shape.kv_heads * (slots * slot + rest + _ROW * self.uneven)
        waiting = max(0, patience(policy.needs.together, slots) - 1)
        total += waiting * shape.heads * shape.key_width * shape.dtype.itemsize
        if self.turning:
            kept = min(slots, self.limit or slots)
            twice = policy.sizing.outlasting(kept) * shape.kv_heads
            total += twice * bytes_held_twice(shape.key_width, shape.dtype)
        return work.batch * total


def _counts_in_cache(recipe: Recipe, outline: Outline) -> bool:
    rule = recipe.positions or recipe.policy.position_rule
    return rule == "cache" and bool(outline.turned)


@cache
def _measured(policy: Policy, kind: StoreKind, shape: Shape, turning: bool) -> tuple[int, int]:
    """Bytes of a slot, and of all that is there whatever the number of slots, of one KV head."""
    few, many = _PROMPTS
    less, more = (_bytes_of_prompt(policy, kind, shape, turning, n) for n in _PROMPTS)
    slot = -(-(more - less) // (many - few))
    return slot, max(less - few * slot, more - many * slot)


@torch.no_grad()
def _bytes_of_prompt(
    policy: Policy, kind: StoreKind, shape: Shape, turning: bool, tokens: int
) -> int:
    """Bytes of a layer with one KV head that has read so many tokens and evicts nothing."""
    progress = Progress(1, Limits([policy], None, Uniform(), None))
    progress.frozen = 1
    layers: list[HiveLayer] = []
    layers.append(HiveLayer(policy, kind, progress, 0, layers, _TURN if turning else None))
    keys, values, queries = (
        torch.zeros(1, heads, tokens, width, dtype=shape.dtype, device="cpu")
        for heads, width in (
            (1, shape.key_width),
            (1, shape.value_width),
            (shape.heads // shape.kv_heads, shape.key_width),
        )
    )
    layers[0].update(keys, values)
    layers[0].attend(queries, 1.0)
    _ = layers[0].slots.position  # written down
    return layers[0].nbytes


def _bytes_of_limits(limits: Limits, work: Workload) -> int:
    """Bytes of the limits of all layers, and of what is known of each row."""
    if limits.all is not None:
        for layer in range(len(limits.policies)):
            limits.target(layer)
    return work.batch * (limits.nbytes + 2 * torch.int64.itemsize)


def _stock_bytes(outline: Outline, index: int, work: Workload) -> int:
    """The most bytes of a layer that is not compressed."""
    if index not in outline.shapes:
        return work.batch * outline.fixed[index]
    if work.tokens is None:
        raise _unknown(f"layers of {outline.family} that are not compressed hold them too")
    first = min(work.chunk or work.tokens, work.tokens)
    later = min(work.growing, work.tokens)
    return max(
        _after(outline, index, work.batch, steps)
        for steps in ((first,), (max(1, work.tokens - later), later))
    )


def _after(outline: Outline, index: int, batch: int, steps: Iterable[int]) -> int:
    """Bytes of a stock layer after steps of so many tokens."""
    shape, layer = outline.shapes[index], outline.stock_layers()[index]
    for tokens in steps:
        layer.update(
            *(
                torch.empty(batch, shape.kv_heads, tokens, width, dtype=shape.dtype, device="meta")
                for width in (shape.key_width, shape.value_width)
            )
        )
    return storage_bytes([vars(layer)])


def _unknown(reason: str) -> ValueError:
    return ValueError(f"the size depends on the number of tokens read ({reason}): give tokens=")
