"""One side of a packed store, keys or values: exact ends, and parts in few bits between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvhive.stores._exact import Exact
from kvhive.stores._part import Form, Part

NEVER = float("-inf")


class Side:
    """Keys or values of R rows.

    Every token has a column, `width` in all: sinks first, then the parts, each right-aligned in
    columns of its own, then the newest tokens. The last part of a row reaches up to its newest
    tokens, so that in a store of one part a token's column tells only how many come after it.

    exact: all tokens to begin with, or what is left of them. forms: of the parts there can be; the
    parts that there are have the first of them.
    """

    def __init__(self, exact: Exact, forms: Sequence[Form]) -> None:
        self.exact = exact
        self.forms = tuple(forms)
        self.parts: list[Part] = []
        self._lay_out()

    @property
    def lengths(self) -> Tensor:
        """int64 `[R]` on the CPU: tokens of each row, sinks not counted."""
        exact, empty = self.exact, self.exact.empty
        tail = torch.full((len(exact.tokens),), exact.tail)
        if empty is not None:
            tail = tail - empty
        for part in self.parts:
            tail = tail + part.lengths
        return tail

    @property
    def sink_counts(self) -> Tensor:
        """int64 `[R]` on the CPU: exact first tokens of each row."""
        exact = self.exact
        if exact.missing is None:
            return torch.full((len(exact.tokens),), exact.sinks)
        return exact.sinks - exact.missing[:, : exact.sinks].sum(1).cpu()

    @property
    def width(self) -> int:
        """Columns."""
        return self._before_tail + self.exact.tail

    def places(self) -> list[Tensor]:
        """For every part int64 `[R]` on the CPU: the column of each row's first token."""
        return self._places

    def _lay_out(self) -> None:
        """Find out where the parts are; what is appended to the newest tokens changes nothing."""
        empty, end = self.exact.empty, self.exact.sinks
        self._places: list[Tensor] = []
        for part in self.parts[:-1]:
            end += part.longest
            self._places.append(end - part.lengths)
        if self.parts:
            lengths = self.parts[-1].lengths
            reach = lengths if empty is None else lengths - empty
            end += max(0, int(reach.max()))
            self._places.append(end - reach)
        self._before_tail = end

    def columns(self, first: int, last: int) -> Tensor:
        """float32 `[R, last - first, d]`: the tokens of some columns, unpacked; zeros elsewhere."""
        exact, tokens = self.exact, self.exact.tokens
        out = tokens.new_zeros(len(tokens), last - first, tokens.shape[2], dtype=torch.float32)
        ends = ((0, 0, exact.sinks), (self._before_tail, exact.sinks, exact.used))
        for column, start, stop in ends:
            begin, end = max(first, column), min(last, column + stop - start)
            if begin < end:
                cut = slice(start + begin - column, start + end - column)
                held = tokens[:, cut].float()
                if exact.missing is not None:
                    held = held.masked_fill(exact.missing[:, cut, None], 0)
                out[:, begin - first : end - first] = held
        for part, place in zip(self.parts, self.places(), strict=True):
            rows = zip(place.tolist(), part.lengths.tolist(), strict=True)
            for row, (at, length) in enumerate(rows):
                begin, end = max(first, at), min(last, at + length)
                if begin < end:
                    numbers = part.row(row, begin - at, end - at)
                    out[row, begin - first : end - first] = numbers
        return out

    def products(self, query: Tensor, out: Tensor) -> None:
        """Products of float32 queries `[R, G, d]` with all tokens, to float32 `[R, G, width]`.

        A column without a token of its row is left as it is, or minus infinity.
        """
        exact = self.exact
        product = query @ exact.tokens.float().transpose(1, 2)
        if exact.missing is not None:
            product.masked_fill_(exact.missing[:, None], NEVER)
        out[..., : exact.sinks] = product[..., : exact.sinks]
        out[..., self._before_tail :] = product[..., exact.sinks :]
        for part, place in zip(self.parts, self.places(), strict=True):
            part.logits(query, out, place)

    def mixed(self, weights: Tensor) -> Tensor:
        """All tokens, weighed by float32 `[R, G, width]`: float32 `[R, G, d]`."""
        exact = self.exact
        ends = weights[..., : exact.sinks], weights[..., self._before_tail :]
        joined = torch.cat(ends, -1)
        if exact.missing is not None:  # columns that a part reaches into
            joined = joined.masked_fill(exact.missing[:, None], 0)
        out = joined @ exact.tokens.float()
        for part, place in zip(self.parts, self.places(), strict=True):
            part.mix(weights, out, place)
        return out

    def pack(self, count: int) -> Tensor:
        """Pack the oldest `count` columns of the newest tokens, into the first part.

        Returns int64 `[R]` on the CPU, how many tokens of each row that were.
        """
        tokens, missing = self.exact.oldest(count)
        if missing is None:
            lengths = torch.full((len(tokens),), count)
            flat = tokens.reshape(-1, tokens.shape[2]).clone()
        else:
            lengths = count - missing.sum(1).cpu()
            flat = tokens[~missing]
        self.exact.drop_oldest(count)
        self.put(0, flat, lengths)
        return lengths

    def put(self, part: int, tokens: Tensor, lengths: Tensor) -> None:
        """Pack tokens `[N, d]`, so many of each row, behind those of a part."""
        while len(self.parts) <= part:
            nothing = torch.zeros_like(lengths)
            self.parts.append(self.forms[len(self.parts)].part(tokens[:0], nothing))
        self.parts[part] = self.parts[part].joined(tokens, lengths)
        self._lay_out()

    def put_in(self, marked: Tensor, tokens: Tensor) -> None:
        """Replace the tokens in the columns marked, bool `[R, width]`, by those of `[R, width, d]`.

        Where they are packed, they are packed anew, each with a grid of its own.
        """
        exact = self.exact
        for part, place in zip(self.parts, self.places(), strict=True):
            held, column = self._columns_of(part, place)
            own = marked.gather(1, column)[held]
            new = tokens.gather(1, column[..., None].expand(-1, -1, tokens.shape[2]))[held][own]
            part.replaced(own.nonzero()[:, 0], new)
        ends = [slice(0, exact.sinks), slice(marked.shape[1] - exact.tail, None)]
        mine = torch.cat([marked[:, end] for end in ends], 1)
        new = torch.cat([tokens[:, end] for end in ends], 1)
        mine = mine if exact.missing is None else mine & ~exact.missing
        exact.set(mine, new[mine])

    def _columns_of(self, part: Part, place: Tensor) -> tuple[Tensor, Tensor]:
        """bool and int64 `[R, longest]`: the columns of a part's tokens, where there are any."""
        device, number = self.exact.tokens.device, torch.arange(part.longest)
        held, column = number < part.lengths[:, None], number + place[:, None]
        return held.to(device), column.clamp_max(max(self.width - 1, 0)).to(device)

    def keep(self, marked: Tensor) -> None:
        """Keep the tokens in the columns marked, bool `[R, width]`, False where there is none."""
        exact = self.exact
        places = zip(self.parts, self.places(), strict=True)
        columns = [self._columns_of(part, place) for part, place in places]
        self.parts = [
            part.kept(marked.gather(1, column)[held])
            for part, (held, column) in zip(self.parts, columns, strict=True)
        ]
        ends = marked[:, : exact.sinks], marked[:, marked.shape[1] - exact.tail :]
        joined = torch.cat(ends, 1)
        exact.keep(joined if exact.missing is None else joined & ~exact.missing)
        self._lay_out()

    def select(self, which: Tensor) -> None:
        """Row i becomes what row `which[i]` was."""
        self.exact.select(which)
        self.parts = [part.selected(which.cpu()) for part in self.parts]
        self._lay_out()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        places = sum(place.untyped_storage().nbytes() for place in self._places)
        return self.exact.nbytes + places + sum(part.nbytes for part in self.parts)
