"""Packed store: the first tokens and the newest ones exactly, all between them in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kvhive.kernels import Ask, Needs, Observed, Rows, attend, report, segments
from kvhive.kernels.chunked import CHUNK, columns_of
from kvhive.kernels.dispatch import attend_packed, serves_packed
from kvhive.plan import Plan
from kvhive.stores._columned import Columned
from kvhive.stores._ends import aligned_labels, ends, plain_rows
from kvhive.stores._exact import Exact, aligned
from kvhive.stores._merging import fold
from kvhive.stores._part import Form
from kvhive.stores._segments import segments_of, served
from kvhive.stores._side import Side
from kvhive.stores.base import LayerFacts, Store, StoreKind

FEW = 16  # queries of a step at most for all of its probabilities to be held at once
BLOCK = 1024  # tokens unpacked at a time for more queries
AHEAD = 32  # exact tokens that room is made for at once
NEVER = float("-inf")


@dataclass(frozen=True)
class Packing:
    """How a store packs.

    keys, values: forms, one a tier, the best first. sinks: first tokens of a row that stay exact.
    keys_due, values_due: how many of the oldest of so many newest tokens are packed when a step is
    over. residual: newest tokens that stay exact of a prompt; None: those that are not due.
    """

    keys: tuple[Form, ...]
    values: tuple[Form, ...]
    sinks: int
    keys_due: Callable[[int], int]
    values_due: Callable[[int], int]
    residual: int | None = None


@dataclass(frozen=True)
class PackedKind(StoreKind):
    """Base of the settings of all packed stores."""

    def packing(self, key_width: int, value_width: int) -> Packing:
        """For heads of such sizes. Raises `ValueError` for sizes that it cannot pack."""
        raise TypeError(f"{type(self).__name__} does not pack")

    def check_heads(self, width: int) -> None:
        """See the base."""
        self.packing(width, width)

    def new(self, facts: LayerFacts, earlier: Sequence[Store]) -> Store:
        """An empty store."""
        return PackedStore(self)


class PackedStore(Columned):
    """Keys and values, each a `Side` of rows (batch row, KV head) that may hold different numbers.

    A prompt is attended to as it is and packed when its step is over, after the eviction. Decoding
    multiplies with packed tokens where they lie; more than FEW queries at once unpack BLOCK tokens
    at a time. What is dropped leaves the codes of the rest as they are.
    """

    packs = True

    def __init__(self, kind: PackedKind) -> None:
        self._kind = kind
        self.length = self.batch = self.heads = 0
        self._made = False  # any token ever came
        self._whole = True  # nothing was packed or dropped yet: slots are columns, all exact
        self._level = True  # every slot is the column of the same number
        self._tiers: Tensor | None = None  # uint8 [R, n]: of packed tokens, right-aligned
        self._dtype = torch.float32

    # ---- what every store does ------------------------------------------------------------------

    @property
    def knows_empty(self) -> bool:
        """Whether rows hold tokens alone, so that attention need not be told of empty slots."""
        return not self._whole

    @property
    def room(self) -> int:
        """Slots there is room for."""
        if not self.length:
            return 0
        free = (side.exact.room - side.exact.used for side in self._sides)
        return self.length + min(free)

    @property
    def mean(self) -> int:
        """Slots that a row holds, on average, rounded up."""
        if not self.length:
            return 0
        lengths = self._counts()
        return -(-int(lengths.sum()) // len(lengths))

    def append(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Add q tokens, exactly; room beyond a few tokens is not made."""
        self.batch, self.heads, fresh, _ = keys.shape
        if not self.length:
            self._made = self._whole = self._level = True
            self._tiers = None
            self._dtype = keys.dtype
            self.packing = packing = self._packing(keys.shape[3], values.shape[3])
            self._keys = Side(Exact(plain_rows(keys)), packing.keys)
            self._values = Side(Exact(plain_rows(values)), packing.values)
        else:
            for side, new in ((self._keys, keys), (self._values, values)):
                side.exact.append(new.flatten(0, 1), AHEAD)
        self.length += fresh

    def _packing(self, key_width: int, value_width: int) -> Packing:
        return self._kind.packing(key_width, value_width)

    def attend(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """All at once while nothing is packed; else see the class."""
        if self._whole:
            return attend(query, *self._exact(), ask)
        if query.shape[2] <= FEW:
            return self._attend_few(query, ask)
        return self._attend_many(query, ask)

    def report(self, query: Tensor, ask: Ask) -> Observed:
        """What `attend` would report."""
        if self._whole:
            return report(query, self._exact()[0], ask)
        if query.shape[2] <= FEW:
            return self._observed(query, ask, self._weights(query, ask))
        return self._attend_many(query, ask)[1]

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values unpacked, of heads padded with zeros to the longest."""
        if self._whole:
            return self._exact()
        held = (self._block(side, 0, side.width).transpose(2, 3) for side in self._sides)
        keys, values = (self._slots(one).transpose(2, 3).to(self._dtype) for one in held)
        return keys, values

    def compact(self, plan: Plan, room: int) -> Store:
        """Fold and keep what the plan says. What was exact is packed at once where it is due."""
        if plan.into is not None:
            self._fold(plan.into)
        if self._whole:
            self._arrange(plan.keep.flatten(0, 1), plan.best)
        else:
            self._keep(plan.keep.flatten(0, 1))
        self.length = plan.longest
        self._look()
        return self

    def align(self, plan: Plan, room: int) -> Store:
        """As `compact`, but what is exact stays so: it has not been judged yet."""
        if not self._whole:
            return self.compact(plan, room)
        places = plan.index.flatten(0, 1)[..., None]
        for side in self._sides:
            held = torch.take_along_dim(side.exact.tokens, places, 1)
            side.exact = Exact(held)
        self.length = plan.longest
        return self

    @property
    def due(self) -> bool:
        """Whether `pack` would pack keys."""
        if not self.length:
            return False
        first = self.packing.sinks if self._whole else 0
        return self.packing.keys_due(max(0, self._keys.exact.tail - first)) > 0

    def pack(self, valid: Tensor | None = None) -> None:
        """Pack what is due. valid: bool `[b, K, length]`, False for empty slots; None: none are."""
        if not self.length:
            return
        packing = self.packing
        if self._whole:
            tail = self.length - packing.sinks
            if tail > 0 and max(packing.keys_due(tail), packing.values_due(tail)) > 0:
                self._arrange(valid.flatten(0, 1) if valid is not None else None, None)
                self._look()
            return
        if (count := packing.values_due(self._values.exact.tail)) > 0:
            self._values.pack(count)
        if (count := packing.keys_due(self._keys.exact.tail)) > 0:
            lengths = self._keys.pack(count)
            if len(packing.keys) > 1:
                self._remember(lengths)
            self._look()

    def resize(self, room: int) -> None:
        """Nothing to do: room is never made for many tokens."""

    def take_keys(self, slots: Tensor) -> Tensor:
        """Keys `[N, d]` of the slots marked, unpacked."""
        return self.view()[0][slots]

    def put_keys(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of the slots marked, packed anew where they were packed."""
        self._put(self._keys, slots.flatten(0, 1), keys)

    def truncate(self, length: int) -> None:
        """Forget the newest slots beyond `length`."""
        count = self.length - length
        if all(side.exact.holds_newest(count) for side in self._sides):
            for side in self._sides:
                side.exact.drop_newest(count)
        else:
            stays = torch.arange(self.length, device=self._keys.exact.tokens.device) < length
            self._keep(stays.expand(self.batch * self.heads, -1))
        self.length = length
        self._look()

    def select_rows(self, rows: Tensor) -> None:
        """Re-index the batch: row i becomes what row `rows[i]` was (int64 `[new batch]`)."""
        heads = torch.arange(self.heads, device=rows.device)
        which = (rows[:, None] * self.heads + heads).flatten()
        for side in self._sides:
            side.select(which)
        self.batch = len(rows)
        if self._tiers is not None:
            self._tiers = self._tiers.index_select(0, which)
        self._look()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: codes, grids, exact tokens, and room."""
        if not self._made:
            return 0
        tiers = 0 if self._tiers is None else self._tiers.untyped_storage().nbytes()
        return tiers + sum(side.nbytes for side in self._sides)

    # ---- attention ------------------------------------------------------------------------------

    def _attend_few(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        if self._launches(query, ask):
            return self._attend_at_once(query, ask)
        weights = self._weights(query, ask)
        out = self._values.mixed(weights)
        seen = self._observed(query, ask, weights)
        batch, heads, q, _ = query.shape
        return out.view(batch, heads, q, -1).to(query.dtype), seen

    def _launches(self, query: Tensor, ask: Ask) -> bool:
        """Whether a GPU's kernel takes all parts of all rows in one launch."""
        keys, values = self._sides
        fits = serves_packed(query, keys.exact.tokens, values.exact.tokens, ask)
        return fits and served(keys, values, ask.needs.attention)

    def _attend_at_once(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        form = self._keys.forms[0]
        cut = segments_of(self._keys, self._values, self.length)
        turned = form.turned(query.float()).to(query.dtype)
        out, seen = attend_packed(turned, cut, ask, self.length)
        needs = ask.needs
        seen = replace(
            seen,
            queries=query if needs.queries else None,
            keys=self.view()[0] if needs.keys else None,
        )
        return self._values.forms[0].turned_back(out.float()).to(query.dtype), seen

    def _weights(self, query: Tensor, ask: Ask) -> Tensor:
        """float32 `[R, G * q, width]`: what each query gives every column."""
        batch, _, q, width = query.shape
        rows = (query.float() * ask.scale).reshape(batch * self.heads, -1, width)
        size = self._keys.width
        shape = *rows.shape[:2], size
        out = rows.new_empty(shape) if self._level else rows.new_full(shape, NEVER)
        self._keys.products(rows, out)
        if ask.valid is not None:
            out.masked_fill_(~self._marked(ask.valid.flatten(0, 1))[:, None], NEVER)
        if q > 1 and ask.causal:
            own = torch.arange(q, device=out.device)
            hidden = (own > own[:, None]).repeat(out.shape[1] // q, 1)
            out[..., size - q :].masked_fill_(hidden, NEVER)
        weights = out.softmax(-1)
        if ask.step.real is not None:
            real = ask.step.real.repeat_interleave(self.heads, 0).repeat(1, out.shape[1] // q)
            weights = weights.masked_fill(~real[..., None], 0)
        return weights if ask.valid is None else weights.nan_to_num_(0.0)

    def _observed(self, query: Tensor, ask: Ask, weights: Tensor) -> Observed:
        batch, heads, q, _ = query.shape
        needs, count = ask.needs, min(ask.needs.last_rows, q)
        each = weights.view(batch, self.heads, -1, q, weights.shape[2])
        columns = columns_of(each, needs, behind=0) if needs.columns else None
        rows = each[:, :, :, q - count :].reshape(batch, heads, count, -1) if count else None
        return Observed(
            fresh=q,
            columns=None if columns is None else self._slots(columns),
            rows=None if rows is None else Rows.of(self._slots(rows)),
            queries=query if needs.queries else None,
            keys=self.view()[0] if needs.keys else None,
            scale=ask.scale,
        )

    def _attend_many(self, query: Tensor, ask: Ask) -> tuple[Tensor, Observed]:
        """A block of columns after the other, the step's own tokens last."""
        q, size = query.shape[2], self._keys.width
        edges = [*range(0, size - q, BLOCK), size - q, size]
        blocks = [(first, last) for first, last in pairwise(edges) if first < last]
        seen = self._seen(ask)
        asks = []
        for first, last in blocks:
            valid = None if seen is None else seen[:, first:last].view(self.batch, self.heads, -1)
            asks.append(replace(ask, valid=valid, causal=ask.causal and last == size))
        parts = [
            segments.segment(
                query, self._block(self._keys, *block), self._block(self._values, *block), part
            )
            for block, part in zip(blocks, asks, strict=True)
        ]
        out, lse = segments.merge(parts)
        seen_by = [*zip(blocks, asks, strict=True)]
        return out.to(query.dtype), self._seen_by_many(query, ask, lse, seen_by)

    def _seen_by_many(
        self, query: Tensor, ask: Ask, lse: Tensor, blocks: list[tuple[tuple[int, int], Ask]]
    ) -> Observed:
        """What blocks of columns report, as of slots; a block's keys are unpacked as it is read."""
        needs, columns, rows = ask.needs, None, None

        def reported(part: Needs) -> Iterator[Observed]:
            for place, asked in blocks:
                keys = self._block(self._keys, *place)
                yield segments.report(query, keys, lse, replace(asked, needs=part))

        if needs.columns is not None:
            found = [one.columns for one in reported(replace(needs, last_rows=0))]
            columns = self._slots(torch.cat([one for one in found if one is not None], -1))
        if count := min(needs.last_rows, query.shape[2]):

            def block(start: int, stop: int) -> Tensor:
                each = (one.rows for one in reported(Needs(last_rows=count)))
                held = [one.block(start, stop) for one in each if one is not None]
                return self._slots(torch.cat(held, -1))

            rows = Rows(count, block, CHUNK)
        return Observed(
            fresh=query.shape[2],
            columns=columns,
            rows=rows,
            queries=query if needs.queries else None,
            keys=self.view()[0] if needs.keys else None,
            scale=ask.scale,
        )

    def _block(self, side: Side, first: int, last: int) -> Tensor:
        """float32 `[b, K, last - first, d]`."""
        block: Tensor = side.columns(first, last).unflatten(0, (self.batch, self.heads))
        return block

    # ---- packing, folding, dropping -------------------------------------------------------------

    def _arrange(self, keep: Tensor | None, best: Tensor | None) -> None:
        """Pack what is due of all that is held exactly. keep: bool `[R, length]`, what stays; None:
        all. best: bool `[b, K, length]`, what goes to the first tier; None: all.
        """
        tokens = self._keys.exact.tokens
        if keep is None:
            keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        counts = keep.sum(1)
        packing, most = self.packing, int(counts.max())
        sinks = counts.clamp_max(packing.sinks)
        most -= min(packing.sinks, most)
        place = (keep.cumsum(1) - 1)[keep]  # of a token among those of its row
        row = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)[keep]
        tier: Tensor | None = None
        if best is not None and len(packing.keys) > 1:
            tier = (~best.flatten(0, 1)[keep]).long()
        sides = []
        for side, due in ((self._keys, packing.keys_due), (self._values, packing.values_due)):
            exact = most - due(most) if packing.residual is None else packing.residual
            tail = (counts - sinks).clamp_max(exact)
            first = counts - tail
            inside = (place >= sinks[row]) & (place < first[row])
            flat = side.exact.tokens[keep]
            most_sinks = min(packing.sinks, int(counts.max()))
            made = Side(Exact(*ends(flat, counts, sinks, tail), most_sinks), side.forms)
            for number in range(len(side.forms)):
                if tier is None and number:
                    break
                own = inside if tier is None else inside & (tier == number)
                lengths = row[own].bincount(minlength=len(keep)).cpu()
                if int(lengths.max()):
                    made.put(number, flat[own], lengths)
            sides.append(made)
            if side is self._keys and len(side.forms) > 1:
                labels = torch.zeros_like(row) if tier is None else tier
                self._tiers = aligned_labels(labels[inside], row[inside], len(keep))
        self._keys, self._values = sides
        self._whole = False

    def _fold(self, into: Tensor) -> None:
        """Put the plain mean of every slot and what joins it in its place; into as in `Plan`."""
        joining = into >= 0
        joined = torch.zeros_like(into).scatter_add_(-1, into.clamp_min(0), joining.long())
        marked = joined > 0
        for side, held in zip(self._sides, self.view(), strict=True):
            self._put(side, marked.flatten(0, 1), fold(held, into)[marked])

    def _put(self, side: Side, marked: Tensor, tokens: Tensor) -> None:
        """Replace what the slots marked in bool `[R, length]` hold by tokens `[N, d]`."""
        dense = tokens.new_zeros(*marked.shape, tokens.shape[1])
        dense[marked] = tokens
        if not (self._level):
            column, held = self._column()
            nowhere = side.width
            place = torch.where(held, column, nowhere)[..., None].expand_as(dense)
            wide = dense.new_zeros(len(dense), nowhere + 1, dense.shape[2])
            dense = wide.scatter_(1, place, dense)[:, :nowhere]
        side.put_in(self._marked(marked), dense)

    def _keep(self, slots: Tensor) -> None:
        """Keep the slots marked in bool `[R, length]`, packed as they are."""
        tiers, columns = self._tiers_kept(slots), self._marked(slots)
        for side in self._sides:
            side.keep(columns)
        self._tiers = tiers

    def _tiers_kept(self, slots: Tensor) -> Tensor | None:
        """`_tiers` of the slots marked in bool `[R, length]`."""
        if self._tiers is None:
            return None
        packed = self._packed_counts().to(slots.device)[:, None]
        sinks = self._keys.sink_counts.to(slots.device)[:, None]
        empty = self.length - self._counts().to(slots.device)[:, None]
        size = self._tiers.shape[1]
        place = torch.arange(size, device=slots.device) - (size - packed)  # among those packed
        keep = slots.gather(1, (place + sinks + empty).clamp(0, self.length - 1)) & (place >= 0)
        order, _ = aligned(keep)
        return self._tiers.gather(1, order)

    def _remember(self, lengths: Tensor) -> None:
        """So many more tokens of each row (int64 `[R]` on the CPU) are in the first tier."""
        before, held = self._tiers, self._packed_counts() - lengths
        if before is None:
            device = self._keys.exact.tokens.device
            before = torch.zeros(len(lengths), 0, dtype=torch.uint8, device=device)
        size, most = before.shape[1], int(lengths.max())
        keep = torch.cat(
            [
                torch.arange(size) >= size - held[:, None],
                torch.arange(most) < lengths[:, None],
            ],
            1,
        ).to(before.device)
        order, _ = aligned(keep)
        self._tiers = torch.nn.functional.pad(before, (0, most)).gather(1, order)
