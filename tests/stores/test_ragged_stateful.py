"""Stores and slots after many random operations against plain lists."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Ask, Needs, reference
from kvhive.plan import Plan
from kvhive.slots import Slots
from kvhive.step import Step
from kvhive.stores.base import Store
from kvhive.stores.dense import DenseStore
from tests.stores.ragged_model import RaggedModel

EXAMPLES, OPERATIONS = 12, 2000
CHECKED, ATTENDED = 8, 40  # operations from one look to the next, at contents and at attention
FORKS = 3
FULL = 24  # slots, where something must go
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of its tokens that a head may keep
GROUP, WIDTH, VALUES, NUMBERS = 2, 4, 3, 4096

source = torch.Generator().manual_seed(0)
KEYS = torch.randn(NUMBERS + 1, WIDTH, generator=source)  # of token i: row i % NUMBERS
CONTENTS = torch.randn(NUMBERS + 1, VALUES, generator=source)
QUERIES = torch.randn(3, 3 * GROUP, FULL, WIDTH, generator=source)


@dataclass
class Held:
    """A store, the slots that go with it, and what they must hold."""

    store: Store
    slots: Slots
    model: RaggedModel
    chance: random.Random

    @classmethod
    def new(cls, chance: random.Random) -> Held:
        """With a prompt of a few tokens."""
        model = RaggedModel(chance.randint(1, 3), chance.randint(1, 3))
        size = len(model.heads), len(model.heads[0])
        held = cls(DenseStore(), Slots(*size, {}, {}, torch.device("cpu")), model, chance)
        held.append()
        return held

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Of the tokens that must be held, int64 `[b, K, n]`, and their positions; -1: empty."""
        both = torch.tensor(self.model.padded(), dtype=torch.int64)
        both = both.view(len(self.model.heads), len(self.model.heads[0]), -1, 2)
        return both[..., 0], both[..., 1]

    def append(self) -> None:
        """One to five tokens."""
        number = self.chance.randint(1, 5)
        step = Step.plain(self.model.seen, number)
        self.model.append(number)
        new = self.numbers()[0][..., -number:] % NUMBERS
        room = self.store.length + number + self.chance.randint(0, 4)
        self.store.append(KEYS[new], CONTENTS[new], room)
        self.slots.append(step, room)

    def evict(self) -> None:
        """Any share of each head's tokens, but one token at least, as policies do."""
        numbers, _ = self.numbers()
        if int(numbers.max()) < 0:  # the rows that were selected may all be empty
            return
        shares = [[[self.chance.choice(SHARES)] for _ in row] for row in self.model.heads]
        drawn = torch.rand(numbers.shape, generator=_seeded(self.chance))
        keep = (drawn < torch.tensor(shares)) & (numbers >= 0)
        if not bool(keep.any()):
            keep = numbers >= 0
        plan = Plan.keeping(keep)
        room = plan.longest + self.chance.randint(0, 4)
        self.store = self.store.compact(plan, room)
        self.slots.compact(plan, room)
        self.model.compact(keep.tolist())

    def take_back(self) -> None:
        """Some of the tokens that came after the last eviction, but not all there are."""
        dropped = self.chance.randint(0, min(self.model.fresh, self.store.length - 1))
        self.store.truncate(self.store.length - dropped)
        self.slots.truncate(self.store.length)
        self.model.truncate(dropped)

    def select_rows(self) -> None:
        """Rows in any order, repeated or left out."""
        rows = self.chance.choices(range(len(self.model.heads)), k=self.chance.randint(1, 3))
        self.store.select_rows(torch.tensor(rows))
        self.slots.select_rows(torch.tensor(rows))
        self.model.select_rows(rows)

    def fork(self) -> Held:
        """A copy of it all."""
        store, slots = copy.deepcopy((self.store, self.slots))
        return Held(store, slots, self.model.fork(), self.chance)

    def agrees(self) -> None:
        """Contents and positions; what is said of empty slots is not looked at."""
        numbers, position = self.numbers()
        valid = numbers >= 0
        assert self.store.length == self.slots.length == self.model.length
        keys, values = self.store.view()
        empty = ~valid[..., None]
        expected = KEYS[numbers % NUMBERS].masked_fill_(empty, 0)
        assert torch.equal(keys.masked_fill(empty, 0), expected)
        expected = CONTENTS[numbers % NUMBERS].masked_fill_(empty, 0)
        assert torch.equal(values.masked_fill(empty, 0), expected)
        assert torch.equal(self.slots.position, position.int())
        assert torch.equal(self.slots.tally, valid.sum(-1))

    def attends(self) -> None:
        """As the obvious kernel does over lists padded to the longest."""
        if not self.model.fresh:
            return
        q = self.chance.randint(1, min(self.model.fresh, 3))
        numbers, _ = self.numbers()
        valid = numbers >= 0
        batch, heads = valid.shape[:2]
        query = QUERIES[:batch, : heads * GROUP, :q]
        needs = Needs(columns="sum")
        told = Ask(Step.plain(self.model.seen - q, q), 0.7, needs, valid)
        keys, values = KEYS[numbers % NUMBERS].double(), CONTENTS[numbers % NUMBERS].double()
        expected, known = reference.attend(query.double(), keys, values, told)
        ask = Ask(told.step, told.scale, needs, None if self.store.knows_empty else valid)
        out, seen = self.store.attend(query, ask)
        assert torch.allclose(out.double(), expected, atol=1e-5)
        assert seen.columns is not None
        assert known.columns is not None
        assert torch.allclose(seen.columns[valid], known.columns[valid], atol=1e-5)


def _seeded(chance: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(chance.getrandbits(32))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_any_operations_leave_what_plain_lists_hold(seed: int) -> None:
    chance = random.Random(seed)
    pool = [Held.new(chance)]
    for operation in range(OPERATIONS):
        held = chance.choice(pool)
        drawn = chance.random()
        if held.model.length >= FULL or drawn < 0.2:
            held.evict()
        elif drawn < 0.7:
            held.append()
        elif drawn < 0.8:
            held.take_back()
        elif drawn < 0.9:
            held.select_rows()
        else:
            pool = [*pool, held.fork()][-FORKS:]
        if operation % CHECKED == 0:
            held.agrees()
        if operation % ATTENDED == 0:
            held.attends()
