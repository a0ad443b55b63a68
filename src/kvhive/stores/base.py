"""What a store is: the way the tokens that survive are held in memory, and attended to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvhive.calibration import Profile
from kvhive.kernels import Ask, Observed
from kvhive.plan import Plan
from kvhive.registry import Registry
from kvhive.spec import Spec


class Store(ABC):
    """The storage of one layer: `length` slots of keys and values, under the indices of its
    `Slots`.

    A store may hold them in several segments (packed and exact, thin and whole); nothing outside it
    needs keys in full precision, except through `view` for policies that score them.
    """

    length: int
    packs: ClassVar[bool] = False  # whether `pack` may change what is held

    @property
    @abstractmethod
    def room(self) -> int:
        """Slots there is room for."""

    @property
    def knows_empty(self) -> bool:
        """Whether attention needs `Ask.valid` for padding alone."""
        return False

    @property
    def mean(self) -> int:
        """Slots that a head holds, on average, rounded up."""
        return self.length

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens, keys `[b, K, q, d]` and values `[b, K, q, e]`; make room for `room` slots.

        The old tokens are copied only where there was too little room.
        """

    @abstractmethod
    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """Attention of `[b, H, q, d]` to everything held, whose last q slots are the queries' own.

        Returns the output `[b, H, q, e]` and what `ask.needs` wants to know.
        """

    @abstractmethod
    def report(self, query: Tensor, ask: Ask) -> Observed:
        """What `attend` would report, without the output."""

    @abstractmethod
    def view(self) -> tuple[Tensor, Tensor]:
        """Keys `[b, K, length, d]` and values `[b, K, length, e]` in the model's dtype."""

    @abstractmethod
    def compact(self, plan: Plan, room: int) -> Store:
        """Fold and keep what the plan says, drop all else; make room for `room` slots.

        Returns the store to go on with, which is another where the form changes.
        """

    def align(self, plan: Plan, room: int) -> Store:
        """As `compact`, of a plan that drops nothing but padding."""
        return self.compact(plan, room)

    @property
    def due(self) -> bool:
        """Whether `pack` would change keys."""
        return False

    def pack(self, valid: Tensor | None = None) -> None:  # noqa: B027  # most have nothing to do
        """A step is over: what is due is packed, where this form packs anything.

        valid: bool `[b, K, length]`, False for empty slots; None: every slot holds a token, or the
        store knows.
        """

    @abstractmethod
    def resize(self, room: int) -> None:
        """Hold the same in room for `room` slots, no fewer than there are."""

    @abstractmethod
    def take_keys(self, slots: Tensor) -> Tensor:
        """Keys `[N, d]` of the slots marked in bool `[b, K, length]`, row by row, head by head."""

    @abstractmethod
    def put_keys(self, slots: Tensor, keys: Tensor) -> None:
        """The reverse of `take_keys`: replace them."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor held, metadata and spare room included."""


@dataclass(frozen=True)
class LayerFacts:
    """A layer's place among the compressed layers that hold tokens, how many there are, and the
    model's profile, where the store asks for one.
    """

    place: int = 0
    layers: int = 1
    profile: Profile | None = None


@dataclass(frozen=True)
class StoreKind(Spec):
    """Base of all stores' settings: frozen fields are knobs, `new` makes one layer's storage.

    calibration: the method whose profile it reads; None for no profile. rewritable: whether the key
    of a single token can be replaced, as folding and turning it do. shareable: whether queries of
    other layers may read what it holds (`kvsharer`). example: what to write before
    it in a recipe that shows what it does.
    """

    calibration: ClassVar[str | None] = None
    rewritable: ClassVar[bool] = True
    shareable: ClassVar[bool] = True
    example: ClassVar[str] = "full"

    @property
    def profile_file(self) -> str | None:
        """The file of the profile, where a knob called `profile` names one."""
        file: str | None = getattr(self, "profile", None)
        return file

    def check_profile(self, profile: Profile, layers: int, kv_heads: int) -> None:
        """Raises `ValueError` for a profile without what it reads, or of a model of other sizes:
        compressed layers, and KV heads in each of them.
        """

    def sources(self, layers: int, profile: Profile | None) -> Sequence[int]:
        """For each of so many compressed layers, the place of the one whose tokens it attends to:
        its own, or that of an earlier one which holds its own. Others get no store.
        """
        return range(layers)

    @property
    def best(self) -> float | None:
        """The part of the tokens seen that it holds better than the rest; None: it holds all alike.
        An eviction then says which those are (`Plan.best`).
        """
        return None

    @property
    def fullest(self) -> StoreKind:
        """The settings whose bytes are never fewer, by which a cache's size is reckoned."""
        return self

    def check_heads(self, width: int) -> None:
        """Raises `ValueError` for heads of so many numbers, where it cannot hold them."""

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> Store:
        """An empty store for one layer. earlier: those of the layers before it."""
        raise TypeError(f"{type(self).__name__} does not make a store")


STORES: Registry[StoreKind] = Registry("store")
