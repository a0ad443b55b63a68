"""Rows in few bits as they come, go and move: what a packed store does with `PackedRows`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvhive.kernels.hadamard import hadamard
from kvhive.kernels.packed import PackedRows, Runs, coded, logits, mix
from kvhive.stores._flat import fits, marked_of, moved, slots_of, spare, starts_of
from kvhive.stores._part import Form, Part


class Coding(Form):
    """A form in few bits."""

    @abstractmethod
    def packed(self, tokens: Tensor, lengths: Tensor) -> PackedRows:
        """Tokens `[N, width]` of all rows one after another; lengths: int64 `[R]` on the CPU."""

    def part(self, tokens: Tensor, lengths: Tensor) -> Coded:
        """See the base."""
        return Coded(self, self.packed(tokens, lengths))


@dataclass(eq=False)
class Coded(Part):
    """Tokens in few bits."""

    form: Coding
    rows: PackedRows

    @property
    def lengths(self) -> Tensor:
        """See the base."""
        return self.rows.lengths

    @property
    def packed_rows(self) -> PackedRows:
        """See the base."""
        return self.rows

    def row(self, row: int, first: int, last: int) -> Tensor:
        """See the base."""
        return self.form.turned_back(self.rows.row(row, first, last))

    def logits(self, query: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base."""
        logits(self.form.turned(query), self.rows, out, at)

    def mix(self, weights: Tensor, out: Tensor, at: Tensor) -> None:
        """See the base."""
        mixed = torch.zeros_like(out)
        mix(weights, self.rows, mixed, at)
        out += self.form.turned_back(mixed)

    def joined(self, tokens: Tensor, lengths: Tensor) -> Coded:
        """See the base."""
        return Coded(self.form, joined(self.rows, self.form.packed(tokens, lengths)))

    def replaced(self, which: Tensor, tokens: Tensor) -> None:
        """See the base; for tokens with grids of their own alone."""
        count = torch.tensor([len(tokens)])
        new = self.form.packed(tokens.to(self.rows.grids.dtype), count)
        slots = held_at(self.rows)[which]
        self.rows.codes.index_copy_(0, slots, new.codes)
        self.rows.grids.index_copy_(0, slots, new.grids)

    def kept(self, keep: Tensor) -> Coded:
        """See the base."""
        return Coded(self.form, kept(self.rows, keep))

    def selected(self, which: Tensor) -> Coded:
        """See the base."""
        return Coded(self.form, selected(self.rows, which))

    @property
    def nbytes(self) -> int:
        """See the base."""
        return nbytes(self.rows)


@dataclass(frozen=True)
class PerToken(Coding):
    """Each token by itself, its numbers in groups of `group` that follow each other.

    bits: of a number. group: divides the width. spreads: whether tokens are multiplied by the
    Hadamard matrix first.
    """

    bits: int
    group: int
    spreads: bool = False

    def turned(self, numbers: Tensor) -> Tensor:
        """See the base."""
        return numbers @ hadamard(numbers.shape[-1]).to(numbers) if self.spreads else numbers

    def turned_back(self, numbers: Tensor) -> Tensor:
        """See the base; the matrix is its own inverse."""
        return self.turned(numbers)

    def packed(self, tokens: Tensor, lengths: Tensor) -> PackedRows:
        """See the base."""
        turned = self.turned(tokens.float())
        codes, grids = coded(turned, self.bits, self.group, tokens.dtype)
        return PackedRows(
            bits=self.bits,
            width=tokens.shape[1],
            group=self.group,
            codes=codes,
            grids=grids,
            starts=starts_of(lengths),
            lengths=lengths,
        )


@dataclass(frozen=True)
class PerChannel(Coding):
    """Runs of `run` tokens that follow each other, each channel by itself (KIVI's form for keys).

    What is left over at the end of a row is a shorter run.
    """

    bits: int
    run: int

    def packed(self, tokens: Tensor, lengths: Tensor) -> PackedRows:
        """See the base."""
        counts = -(-lengths // self.run)
        place = torch.arange(int(counts.sum())) - (starts_of(counts)).repeat_interleave(counts)
        ends = torch.minimum((place + 1) * self.run, lengths.repeat_interleave(counts))
        runs = Runs(ends.int().to(tokens.device), starts_of(counts), counts)
        sizes = ends - place * self.run
        codes, grids = coded(tokens, self.bits, 1, tokens.dtype, sizes.cumsum(0))
        return PackedRows(
            bits=self.bits,
            width=tokens.shape[1],
            group=1,
            codes=codes,
            grids=grids,
            starts=starts_of(lengths),
            lengths=lengths,
            runs=runs,
        )


def tokens_of(rows: PackedRows) -> Tensor:
    """float32 `[N, width]`: the tokens of all rows, one row after another."""
    each = [rows.row(row, 0, length) for row, length in enumerate(rows.lengths.tolist())]
    return torch.cat(each) if each else rows.codes.new_empty(0, rows.width, dtype=torch.float32)


def held_at(rows: PackedRows) -> Tensor:
    """int64 `[N]`: the slot of every token, one row after another."""
    return slots_of(rows.starts, rows.lengths).to(rows.codes.device)


def joined(rows: PackedRows, more: PackedRows) -> PackedRows:
    """With the tokens of `more` (the same rows in the same form, just packed) behind those of each
    row.
    """
    lengths = rows.lengths + more.lengths
    if not fits(rows.starts, lengths, len(rows.codes)):
        rows = laid_out(rows, held_at(rows), rows.lengths, lengths + spare(rows.lengths))
    place = slots_of(rows.starts + rows.lengths, more.lengths).to(rows.codes.device)
    rows.codes.index_copy_(0, place, more.codes)
    if rows.runs is None or more.runs is None:
        rows.grids.index_copy_(0, place, more.grids)
        return replace(rows, lengths=lengths)
    counts = rows.runs.counts + more.runs.counts
    order = _alternating(rows.runs, more.runs).to(place.device)
    before = rows.lengths.int().repeat_interleave(more.runs.counts).to(place.device)
    ends = torch.cat([rows.runs.ends, more.runs.ends + before])[order]
    runs = Runs(ends, starts_of(counts), counts)
    return replace(
        rows, lengths=lengths, grids=torch.cat([rows.grids, more.grids])[order], runs=runs
    )


def laid_out(rows: PackedRows, slots: Tensor, lengths: Tensor, sizes: Tensor) -> PackedRows:
    """The tokens at int64 `slots` `[N]`, `lengths` of a row before the next row's, in room for
    `sizes` (both int64 `[R]` on the CPU); runs stay as they are and are for the caller to mend.
    """
    starts, size = starts_of(sizes), int(sizes.sum())
    place = slots_of(starts, lengths)
    codes = moved(rows.codes, slots, place, size)
    grids = rows.grids if rows.runs is not None else moved(rows.grids, slots, place, size)
    return replace(rows, codes=codes, grids=grids, starts=starts, lengths=lengths)


def kept(rows: PackedRows, keep: Tensor) -> PackedRows:
    """The tokens marked in bool `[N]` (as `tokens_of` orders them).

    Codes stay what they are, and a run of which tokens went keeps its grid: nothing is rounded
    twice. So runs that have dwindled take more bytes a token.
    """
    lengths = marked_of(keep, rows.lengths)
    left = laid_out(rows, held_at(rows)[keep], lengths, lengths)
    if rows.runs is None:
        return left
    sizes = _sizes(rows)
    of_run = torch.arange(len(sizes)).repeat_interleave(sizes)
    sizes = of_run[keep.cpu()].bincount(minlength=len(sizes))
    stays = sizes > 0
    row = torch.arange(len(lengths)).repeat_interleave(rows.runs.counts)[stays]
    left = replace(left, grids=rows.grids[stays.to(rows.grids.device)])
    return _with_runs(left, sizes[stays], row)


def selected(rows: PackedRows, which: Tensor) -> PackedRows:
    """Row i becomes what row `which[i]` was (int64 on the CPU)."""
    lengths = rows.lengths[which]
    slots = slots_of(rows.starts[which], lengths).to(rows.codes.device)
    left = laid_out(rows, slots, lengths, lengths)
    if rows.runs is None:
        return left
    counts = rows.runs.counts[which]
    chosen = slots_of(rows.runs.starts[which], counts).to(rows.codes.device)
    runs = Runs(rows.runs.ends[chosen], starts_of(counts), counts)
    return replace(left, grids=rows.grids[chosen], runs=runs)


def nbytes(rows: PackedRows) -> int:
    """Bytes of every tensor held."""
    held = [rows.codes, rows.grids, rows.starts, rows.lengths]
    if rows.runs is not None:
        held += [rows.runs.ends, rows.runs.starts, rows.runs.counts]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _sizes(rows: PackedRows) -> Tensor:
    """int64 `[M]` on the CPU: tokens of each run."""
    assert rows.runs is not None
    ends = rows.runs.ends.cpu().long()
    before = torch.cat([ends.new_zeros(1), ends[:-1]]) if len(ends) else ends
    before[rows.runs.starts[rows.runs.counts > 0]] = 0
    return ends - before


def _with_runs(rows: PackedRows, sizes: Tensor, row: Tensor) -> PackedRows:
    """With runs of so many tokens (int64 `[M]`), in rows `row` (int64 `[M]`), both on the CPU."""
    counts = row.bincount(minlength=len(rows.lengths))
    total = sizes.cumsum(0)
    ends = total - (rows.lengths.cumsum(0) - rows.lengths)[row]
    runs = Runs(ends.int().to(rows.codes.device), starts_of(counts), counts)
    return replace(rows, runs=runs)


def _alternating(one: Runs, other: Runs) -> Tensor:
    """int64: an order for the runs of both, one behind the other, in which rows are together."""
    row = torch.arange(len(one.counts))
    key = torch.cat([row.repeat_interleave(one.counts), row.repeat_interleave(other.counts)])
    return key.sort(stable=True).indices
