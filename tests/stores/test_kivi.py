"""KIVI: when keys and values are packed, on which grids, and what padding does to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.kernels import Ask
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores.base import LayerFacts, Store
from kvhive.stores.dense import DenseStore
from kvhive.stores.kivi import Kivi

HEADS, WIDTH, RESIDUAL, GROUP = 2, 64, 16, 8
PLAIN = Kivi(bits=2, group=GROUP, residual=RESIDUAL, sink=0)


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys, with channels of different size, and values."""
    source = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.1, 5, WIDTH)
    keys, values = (torch.randn(batch, HEADS, count, WIDTH, generator=source) for _ in range(2))
    return keys * size, values


def fed(kind: Kivi, keys: Tensor, values: Tensor, *steps: int) -> Store:
    """A store that was given the tokens in such steps."""
    store: Store = kind.new(LayerFacts(), [])
    for key, value in zip(keys.split(steps, 2), values.split(steps, 2), strict=True):
        store.append(key, value, store.length + key.shape[2])
        store.pack()
    return store


def packed(store: Store, keys: Tensor, values: Tensor) -> tuple[int, int]:
    """How many of the oldest keys and values differ from what was appended; no newer one may."""
    counts = []
    for held, written in zip(store.view(), (keys, values), strict=True):
        changed = (held != written).any(-1).all(1)[0]
        count = int(changed.sum())
        assert bool(changed[:count].all())
        assert torch.equal(held[:, :, count:], written[:, :, count:])
        counts.append(count)
    return counts[0], counts[1]


def on_grid(numbers: Tensor, dim: int, bits: int) -> Tensor:
    """The quantiser of the card, along one dimension."""
    least, largest = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    step = (largest - least) / (2**bits - 1)
    return ((numbers - least) / step).round().clamp(0, 2**bits - 1) * step + least


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 37, 48])
@pytest.mark.parametrize("later", [[], [1] * 20, [3, 1, 19, 1]])
def test_the_counts_are_the_card_s_however_tokens_come(prompt: int, later: list[int]) -> None:
    """Keys go R at a time, values one by one, and a step of several tokens ends as single ones."""
    keys, values = tokens(prompt + sum(later))
    for done in range(len(later) + 1):
        count = prompt + sum(later[:done])
        given = keys[:, :, :count], values[:, :, :count]
        store = fed(PLAIN, *given, prompt, *later[:done])
        wanted = count - count % RESIDUAL, max(0, count - RESIDUAL)
        assert packed(store, *given) == wanted


def test_a_prompt_and_single_tokens_give_the_same_codes() -> None:
    """On the grids that the card describes: keys per channel of 8 tokens, values per token."""
    keys, values = tokens(75)
    whole = fed(PLAIN, keys, values, 75)
    singly = fed(PLAIN, keys, values, *[1] * 75)
    cut = fed(PLAIN, keys, values, 30, 1, 40, 4)
    runs = keys[:, :, :64].unflatten(2, (-1, GROUP))
    groups = values[:, :, : 75 - RESIDUAL].unflatten(3, (-1, GROUP))
    expected = [on_grid(runs, 3, 2).flatten(2, 3), on_grid(groups, 4, 2).flatten(3, 4)]
    for store in (whole, singly, cut):
        for held, wanted, same in zip(store.view(), expected, whole.view(), strict=True):
            assert torch.equal(held, same)
            torch.testing.assert_close(held[:, :, : wanted.shape[2]], wanted)


def test_keys_are_asymmetric_and_channels_apart() -> None:
    """Channels in another order have their codes in that order; one that is shifted by a constant
    is restored shifted.
    """
    keys, values = tokens(40)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    plain = fed(PLAIN, keys, values, 40).view()[0]
    assert torch.equal(fed(PLAIN, keys[..., order], values, 40).view()[0], plain[..., order])
    shift = torch.zeros(WIDTH)
    shift[7] = 64.0
    moved = fed(PLAIN, keys + shift, values, 40).view()[0]
    torch.testing.assert_close(moved - shift, plain, atol=2e-5, rtol=0)


def test_a_group_of_one_number_is_that_number() -> None:
    keys, values = (torch.full((1, HEADS, 40, WIDTH), number) for number in (1.5, -0.3))
    store = fed(PLAIN, keys, values, 40)
    assert torch.equal(store.view()[0], keys)
    assert torch.equal(store.view()[1], values)


def test_padding_enters_no_group() -> None:
    """What lies in empty slots may be anything; the row is held as it is alone."""
    (keys, values), padded = tokens(50, batch=2), 16
    valid = torch.ones(2, HEADS, 50, dtype=torch.bool)
    valid[1, :, :padded] = False
    keys[1, :, :padded], values[1, :, :padded] = 1e6, -1e6
    store: Store = Kivi(bits=2, group=GROUP, residual=RESIDUAL, sink=2).new(LayerFacts(), [])
    store.append(keys, values, 50)
    store.pack(valid)
    alone = fed(
        Kivi(bits=2, group=GROUP, residual=RESIDUAL, sink=2),
        keys[1:, :, padded:],
        values[1:, :, padded:],
        50 - padded,
    )
    for held, single in zip(store.view(), alone.view(), strict=True):
        assert torch.equal(held[1:, :, padded:], single)


def test_an_eviction_leaves_the_rest_of_a_group_as_it_is() -> None:
    keys, values = tokens(64)
    store = fed(PLAIN, keys, values, 64)
    before = store.view()
    keep = torch.rand(1, HEADS, 64, generator=torch.Generator().manual_seed(3)) < 0.4
    counts = keep.sum(-1, keepdim=True)
    store = store.compact(Plan.keeping(keep), int(counts.max()))
    held = torch.arange(store.length) >= store.length - counts
    for now, then in zip(store.view(), before, strict=True):
        assert torch.equal(now[held], then[keep])


def test_what_fits_the_exact_part_is_attended_to_as_densely() -> None:
    """Bit by bit, in prefill and decoding."""
    keys, values = tokens(RESIDUAL + 3)
    store, dense = Kivi(residual=32, group=GROUP, sink=4).new(LayerFacts(), []), DenseStore()
    start = 0
    for size in (RESIDUAL, 1, 1, 1):
        cut = slice(start, start + size)
        query = torch.randn(1, 2 * HEADS, size, WIDTH)
        ask = Ask(Step.plain(start, size), 0.125)
        for one in (store, dense):
            one.append(keys[:, :, cut], values[:, :, cut], start + size)
        assert torch.equal(store.attend(query, ask)[0], dense.attend(query, ask)[0])
        store.pack()
        start += size
    assert torch.equal(store.view()[0], dense.view()[0])
