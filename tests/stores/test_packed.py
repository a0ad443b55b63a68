"""Packed stores after many random operations, against plain lists of tokens."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Ask, Needs, Observed, reference
from kvhive.kernels.bits import WIDTHS
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores._packed import PackedKind
from kvhive.stores.base import LayerFacts, Store
from kvhive.stores.kivi import Kivi
from kvhive.stores.rotated import Rotated
from kvhive.stores.tiers import Tiers
from tests.support import tensors

EXAMPLES, STEPS = 25, 12
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUNDED = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the size of a key
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of its tokens that a head may keep
SINKS = (0, 2, 4)
SHAPES = ((1, 1, 1), (1, 2, 2), (2, 2, 3), (3, 1, 4))  # rows, KV heads, query heads of each


@dataclass
class Token:
    """One token of one head: what was appended, and what the store made of it once."""

    key: Tensor
    value: Tensor
    sink: bool = False
    packed: dict[str, Tensor] = field(default_factory=dict)


def drawn_kind(chance: random.Random) -> PackedKind:
    """A store that packs as soon as a few tokens are there."""
    bits, other = chance.choice(WIDTHS), chance.choice(WIDTHS)
    group, residual, sink = (
        chance.choice((None, 8, 16)),
        chance.choice((8, 16)),
        chance.choice(SINKS),
    )
    kind = chance.choice((Rotated, Kivi, Tiers))
    if kind is Rotated:
        return Rotated(bits, group, residual, sink)
    if kind is Tiers:
        return Tiers(bits, 0.2, other, group, residual, sink)
    return Kivi(bits, key_bits=None, value_bits=other, group=8, residual=residual, sink=sink)


class Life:
    """A store and what it must hold: for every head a list of tokens, None for an empty slot."""

    def __init__(
        self, kind: PackedKind, chance: random.Random, width: int, dtype: torch.dtype
    ) -> None:
        self.kind, self.chance, self.dtype = kind, chance, dtype
        self.widths = width, chance.choice((width, 64))
        self.batch, self.kv_heads, self.group = chance.choice(SHAPES)
        self.store: Store = kind.new(LayerFacts(), [])
        self.heads: list[list[Token | None]] = [[] for _ in range(self.batch * self.kv_heads)]
        self.source = torch.Generator().manual_seed(chance.getrandbits(32))
        self.fresh = 0  # newest slots that can be taken back
        self.arranged = False  # whether anything was packed or dropped
        self.spread = torch.zeros(2, width)  # least and largest number of every channel of keys

    # ---- what is done to it ---------------------------------------------------------------------

    def step(self, most: int) -> None:
        """Append, attend, perhaps evict, pack, as a layer does."""
        q = self.chance.choice((1, 1, 1, 2, 5, 20, self.chance.randint(1, most)))
        padding = [0] * self.batch
        if q > 1 and self.batch > 1 and self.chance.random() < 0.5:
            padding = [self.chance.randint(0, q - 1) for _ in padding[1:]] + [0]
            self.chance.shuffle(padding)
        behind = bool(self.heads[0])
        self.append(q, padding)
        self.attends(q, padding)
        gaps = behind and any(padding)
        if gaps:
            self.compact(self.valid(), None)
            self.agrees()
        if self.chance.random() < 0.2:
            self.evict()
        self.pack()

    def append(self, q: int, padding: Sequence[int]) -> None:
        """q slots of every head, of each row the first ones empty."""
        size = self.batch, self.kv_heads, q
        keys, values = (torch.randn(*size, width, generator=self.source) for width in self.widths)
        keys[..., 0] *= 4  # a channel as keys have them
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        self.store.append(keys, values, self.store.length + q)
        for number, head in enumerate(self.heads):
            row, kv_head = divmod(number, self.kv_heads)
            for place in range(q):
                real = place >= padding[row]
                pair = keys[row, kv_head, place], values[row, kv_head, place]
                head.append(Token(*pair) if real else None)
        real = self.valid()[..., -q:]
        seen = torch.cat([keys[real].float(), self.spread])
        self.spread = torch.stack([seen.amin(0), seen.amax(0)])
        self.fresh = 0 if any(padding) else self.fresh + q

    def evict(self) -> None:
        """Any share of each head's tokens, or of all alike; with the best of them, or without."""
        valid = self.valid()
        shares = [[[self.chance.choice(SHARES)] for _ in row] for row in valid]
        if self.chance.random() < 0.5:
            drawn = torch.rand(valid.shape[-1], generator=self.source).expand(valid.shape)
            keep = valid & (drawn < 0.6)
        else:
            keep = valid & (torch.rand(valid.shape, generator=self.source) < torch.tensor(shares))
        keep[:, 0, -1] = True  # some token of every row
        best = None
        if self.kind.best is not None and self.chance.random() < 0.8:
            best = keep & (torch.rand(valid.shape, generator=self.source) < 0.3)
        self.compact(keep, best)

    def compact(self, keep: Tensor, best: Tensor | None) -> None:
        """Keep what is marked."""
        self.arrange(keep)
        plan = Plan.keeping(keep, best=best)
        self.store = self.store.compact(plan, plan.longest + self.chance.randint(0, 4))
        for head, marks in zip(self.heads, keep.flatten(0, 1).tolist(), strict=True):
            left = [token for token, stays in zip(head, marks, strict=True) if stays]
            head[:] = [None] * (plan.longest - len(left)) + left
        self.fresh = 0

    def pack(self) -> None:
        """A step is over."""
        valid = self.valid()
        self.store.pack(None if self.arranged or bool(valid.all()) else valid)
        if self.store.knows_empty:
            self.arrange(valid)
        self.agrees()

    def arrange(self, keep: Tensor) -> None:
        """The first of what stays when the store begins to pack stay exact for ever."""
        if self.arranged:
            return
        self.arranged = True
        for head, marks in zip(self.heads, keep.flatten(0, 1).tolist(), strict=True):
            left = [token for token, stays in zip(head, marks, strict=True) if stays]
            for token in left[: self.kind.sink]:  # type: ignore[attr-defined]
                assert token is not None
                token.sink = True

    def take_back(self) -> None:
        """Some of the newest slots, but not all there are."""
        dropped = self.chance.randint(0, min(self.fresh, self.store.length - 1))
        left = self.store.length - dropped
        self.store.truncate(left)
        self.heads = [head[:left] for head in self.heads]
        self.fresh -= dropped

    def select_rows(self) -> None:
        """Rows in any order, repeated or left out."""
        rows = self.chance.choices(range(self.batch), k=self.chance.randint(1, 3))
        self.store.select_rows(torch.tensor(rows))
        old, heads = self.heads, range(self.kv_heads)
        self.heads = [
            copy.deepcopy(old[row * self.kv_heads + head]) for row in rows for head in heads
        ]
        self.batch = len(rows)

    # ---- what must hold -------------------------------------------------------------------------

    def valid(self) -> Tensor:
        """bool `[b, K, n]`."""
        marks = torch.tensor([[token is not None for token in head] for head in self.heads])
        return marks.unflatten(0, (self.batch, self.kv_heads))

    def written(self, name: str, width: int) -> Tensor:
        """What was appended, `[R, n, width]`."""
        empty = torch.zeros(width, dtype=self.dtype)
        rows = [
            torch.stack([empty if t is None else getattr(t, name) for t in head])
            for head in self.heads
        ]
        return torch.stack(rows)

    def agrees(self) -> None:
        """Every token is what was appended, or what it was when it was packed: near that."""
        store, length = self.store, len(self.heads[0])
        assert store.length == length
        assert store.room >= length
        store.resize(length)
        counts = self.valid().sum(-1)
        assert store.mean == (-(-int(counts.sum()) // counts.numel()) if self.arranged else length)
        for name, view, width in zip(("key", "value"), store.view(), self.widths, strict=True):
            assert view.dtype == self.dtype
            held, written = view.flatten(0, 1), self.written(name, width)
            changed = (held != written).any(-1)
            for row, slot in changed.nonzero().tolist():
                if (token := self.heads[row][slot]) is not None:
                    self.agrees_packed(token, name, held[row, slot], length - slot)
            for row, head in enumerate(self.heads):
                for slot, token in enumerate(head):
                    if token is not None and name in token.packed:
                        assert bool(changed[row, slot]) or bool(
                            (token.packed[name] == getattr(token, name)).all()
                        )
        held_by = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors(store, set())
        }
        assert store.nbytes == sum(held_by.values())

    def agrees_packed(self, token: Token, name: str, held: Tensor, age: int) -> None:
        """age: 1 for the newest."""
        assert not token.sink
        kind, written = self.kind, getattr(token, name)
        slip = ROUNDED[self.dtype] * (1 + float(written.float().abs().max()))
        if name in token.packed:
            assert torch.allclose(held.float(), token.packed[name].float(), atol=slip, rtol=0)
            return
        token.packed[name] = held
        residual: int = kind.residual  # type: ignore[attr-defined]
        assert age > residual or (isinstance(kind, Kivi) and name == "key")
        off = held.float() - written.float()
        if isinstance(kind, Rotated):
            assert float(off.norm()) <= rotated_slip(kind, written) + slip * len(off) ** 0.5
            return
        if name == "key":
            widest = self.spread[1] - self.spread[0]
        else:
            widest = written.float().max() - written.float().min()
        other = {"key": "key_bits", "value": "value_bits"}[name]
        bits = getattr(kind, other, None) or min(kind.bits, getattr(kind, "rest_bits", 8))  # type: ignore[attr-defined]
        assert bool((off.abs() <= widest / (2**bits - 1) / 2 + slip).all())

    def attends(self, q: int, padding: Sequence[int]) -> None:
        """As the obvious kernel does over what the store says it holds."""
        needs = Needs(
            columns=self.chance.choice((None, "sum", "square")),
            fold=self.chance.random() < 0.5,
            decay=self.chance.choice((1.0, 0.7)),
            last_rows=self.chance.choice((0, 1, 3, 40)),
            queries=self.chance.random() < 0.5,
            keys=self.chance.random() < 0.5,
        )
        query = torch.randn(
            self.batch, self.kv_heads * self.group, q, self.widths[0], generator=self.source
        ).to(self.dtype)
        step, valid = Step.plain(self.store.length - q, q), self.valid()
        if any(padding):
            real = torch.arange(q) >= torch.tensor(padding)[:, None]
            position = (real.cumsum(1) - 1).masked_fill(~real, -1)
            step = Step("prefill", q, position, q - 1, real.sum(1), real)
        told = Ask(step, self.widths[0] ** -0.5, needs, valid)
        gaps = any(padding) and self.store.length > q
        unknown = gaps or not (self.arranged or bool(valid.all()))
        ask = replace(told, valid=valid if unknown else None)
        expected, known = reference.attend(query, *self.store.view(), told)
        out, seen = self.store.attend(query, ask)
        close = TOLERANCE[self.dtype]
        assert out.dtype == self.dtype
        assert torch.allclose(out.float(), expected.float(), atol=close, rtol=close)
        for report in (seen, self.store.report(query, ask)):
            self.same_report(report, known, valid)

    def same_report(self, ours: Observed, known: Observed, valid: Tensor) -> None:
        close = TOLERANCE[self.dtype]
        assert ours.fresh == known.fresh
        assert ours.scale == known.scale
        assert (ours.columns is None) == (known.columns is None)
        if ours.columns is not None and known.columns is not None:
            assert torch.allclose(ours.columns, known.columns, atol=close, rtol=close)
        assert (ours.rows is None) == (known.rows is None)
        if ours.rows is not None and known.rows is not None:
            assert torch.allclose(ours.rows.all(), known.rows.all(), atol=close, rtol=close)
        assert (ours.queries is None) == (known.queries is None)
        assert (ours.keys is None) == (known.keys is None)
        if ours.keys is not None and known.keys is not None:
            assert torch.equal(ours.keys[valid], known.keys[valid])


def rotated_slip(kind: Rotated, numbers: Tensor) -> float:
    """The most that a token may be off, as a length: half a step for each of its turned numbers."""
    packing = kind.packing(len(numbers), len(numbers))
    form = packing.keys[0]
    groups = form.turned(numbers.float()).unflatten(-1, (-1, form.group))  # type: ignore[union-attr]
    steps = (groups.amax(-1) - groups.amin(-1)) / (2**kind.bits - 1)
    return float((steps / 2).square().sum() * groups.shape[1]) ** 0.5


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from((64, 80, 96, 128, 256)),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
def test_any_operations_leave_what_plain_lists_hold(
    seed: int, width: int, dtype: torch.dtype
) -> None:
    chance = random.Random(seed)
    life = Life(drawn_kind(chance), chance, width, dtype)
    life.step(70)
    other: list[Callable[[], None]] = [life.take_back, life.select_rows, life.evict]
    for _ in range(STEPS):
        if chance.random() < 0.3:
            chance.choice(other)()
            life.agrees()
        life.step(30)
