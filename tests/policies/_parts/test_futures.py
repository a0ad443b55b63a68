"""Queries as a Gaussian: against torch's own statistics, whole rotation matrices and samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.policies._parts.futures import Gaussian, QueryRing, fit
from kvhive.rope import Rotation

WIDTH = 6


def rotation(layout: str = "halves") -> Rotation:
    """Turns four of six channels."""
    return Rotation(torch.tensor([1.0, 0.13]), layout)  # type: ignore[arg-type]


def matrix(turns: Rotation, position: int) -> Tensor:
    """float64 `[d, d]`: what turning by `position` multiplies a column vector by."""
    whole = torch.eye(WIDTH, dtype=torch.float64)
    for pair, frequency in enumerate(turns.frequencies.tolist()):
        one, two = (pair, pair + 2) if turns.layout == "halves" else (2 * pair, 2 * pair + 1)
        angle = torch.tensor(frequency * position, dtype=torch.float64)
        whole[one, one] = whole[two, two] = angle.cos()
        whole[one, two], whole[two, one] = -angle.sin(), angle.sin()
    return whole


def random_numbers(seed: int, *shape: int) -> Tensor:
    """float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_the_fit_is_mean_and_covariance_of_queries_turned_back(layout: str) -> None:
    """Of those that count; the others may be anything."""
    turns = rotation(layout)
    queries = random_numbers(0, 2, 3, 40, WIDTH) + random_numbers(1, WIDTH)
    position = torch.arange(40).expand(2, 40) - 5
    use = position >= torch.tensor([[4], [11]])
    found = fit(queries, position, use, turns, covariance=True)
    for row in range(2):
        there = position[row][use[row]].tolist()
        back = torch.stack([matrix(turns, p).T for p in there])
        for head in range(3):
            query = queries[row, head, use[row]].double()
            turned = (back @ query[..., None]).squeeze(-1)
            assert torch.allclose(found.mean[row, head].double(), turned.mean(0), atol=1e-5)
            spread = turned.T.cov(correction=0)
            assert found.covariance is not None
            assert torch.allclose(found.covariance[row, head].double(), spread, atol=1e-5)
    assert fit(queries, position, use, turns, covariance=False).covariance is None


def test_without_rotation_queries_are_taken_as_they_are() -> None:
    queries = random_numbers(2, 1, 2, 30, WIDTH)
    use = torch.ones(1, 30, dtype=torch.bool)
    found = fit(queries, torch.arange(30)[None], use, None, covariance=False)
    assert torch.allclose(found.mean, queries.mean(2), atol=1e-6)
    assert found.ahead(torch.tensor([30]), 8, None) == found


def test_nothing_to_fit_is_a_mean_of_zero() -> None:
    queries = random_numbers(3, 1, 2, 5, WIDTH)
    use = torch.zeros(1, 5, dtype=torch.bool)
    found = fit(queries, torch.full((1, 5), -1), use, rotation(), covariance=True)
    assert found.covariance is not None
    assert not found.mean.any()
    assert not found.covariance.any()


@pytest.mark.parametrize("layout", ["halves", "pairs"])
@pytest.mark.parametrize(("start", "span"), [(0, 1), (37, 16), (9000, 512)])
def test_ahead_is_the_mean_rotation(start: int, span: int, layout: str) -> None:
    """Mean and covariance as they come out of one averaged matrix, row by row of the batch."""
    turns = rotation(layout)
    mean, root = random_numbers(4, 2, 3, WIDTH), random_numbers(5, 2, 3, WIDTH, WIDTH)
    here = Gaussian(mean, root @ root.transpose(-1, -2))
    starts = torch.tensor([start, start + 3])
    there = here.ahead(starts, span, turns)
    assert there.covariance is not None
    for row, first in enumerate(starts.tolist()):
        average = sum(matrix(turns, p) for p in range(first, first + span)) / span
        expected = (average @ mean[row].double()[..., None]).squeeze(-1)
        assert torch.allclose(there.mean[row].double(), expected, atol=1e-4)
        spread = average @ here.covariance[row].double() @ average.T  # type: ignore[index]
        assert torch.allclose(there.covariance[row].double(), spread, atol=1e-3)


def test_the_expectation_is_that_of_samples() -> None:
    """log E[exp(scale q k)] of 200,000 drawn queries, within a few hundredths."""
    mean, root = 0.5 * random_numbers(6, 1, 2, WIDTH), 0.4 * random_numbers(7, 1, 2, WIDTH, WIDTH)
    keys, scale = random_numbers(8, 1, 1, 9, WIDTH), 0.5
    model = Gaussian(mean, root @ root.transpose(-1, -2))
    drawn = mean[..., None, :] + random_numbers(9, 1, 2, 200_000, WIDTH) @ root.transpose(-1, -2)
    sampled = (scale * drawn @ keys.transpose(-1, -2)).double().exp().mean(2).log()
    assert torch.allclose(model.log_expectation(keys, scale).double(), sampled, atol=0.03)
    plain = Gaussian(mean, None).log_expectation(keys, scale)
    assert torch.allclose(plain, scale * (mean @ keys[:, 0].transpose(-1, -2)), atol=1e-6)


def test_query_heads_meet_the_keys_of_their_group() -> None:
    """Head h belongs to KV head h // (H / K)."""
    mean, keys = random_numbers(10, 1, 6, WIDTH), random_numbers(11, 1, 2, 5, WIDTH)
    logs = Gaussian(mean, None).log_expectation(keys, 1.0)
    for head in range(6):
        expected = keys[0, head // 3] @ mean[0, head]
        assert torch.allclose(logs[0, head], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_ring_holds_the_last_queries(seed: int) -> None:
    """Steps of any length, padded on the left, with old slots where the padding moved away."""
    source = torch.Generator().manual_seed(seed)
    size, rows = 7, 3
    state: dict[str, Tensor] = {}
    kept: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
    for step in range(15):
        fresh = int(torch.randint(1, 12, (1,), generator=source))
        queries = random_numbers(100 * seed + step, rows, 2, fresh, 4)
        position = torch.full((rows, fresh), -1)
        for row, old in enumerate(kept):
            seen = old[-1][0] + 1 if old else 0
            real = int(torch.randint(0, fresh + 1, (1,), generator=source))
            for place in range(fresh - real, fresh):
                at = seen + place - (fresh - real)
                position[row, place] = at
                old.append((at, float(queries[row, 1, place, 0])))
            if seen and real < fresh:
                position[row, fresh - real - 1] = seen - 1
        ring = QueryRing(state, queries, size)
        ring.add(position, queries, ring.newer(position))
        for row, old in enumerate(kept):
            held = [
                (int(p), float(q[0]))
                for p, q in zip(ring.position[row], ring.queries[row, 1], strict=True)
                if p >= 0
            ]
            assert sorted(held) == old[-size:]


def test_one_query_at_the_same_position_of_all_rows_is_taken_in_alike() -> None:
    """`add_one` writes what `add` writes, also when the ring has gone round."""
    apart: dict[str, torch.Tensor] = {}
    together: dict[str, torch.Tensor] = {}
    for position in range(9):
        query = torch.randn(2, 3, 1, 4)
        QueryRing(apart, query, 4).add(torch.full((2, 1), position), query, None)
        QueryRing(together, query, 4).add_one(position, query)
        assert torch.equal(QueryRing(apart).queries, QueryRing(together).queries)
        assert torch.equal(QueryRing(apart).position, QueryRing(together).position)


def test_a_gaussian_is_remembered_until_it_is_forgotten() -> None:
    state: dict[str, Tensor] = {}
    for model in (
        Gaussian(torch.ones(1, 2, 3), torch.ones(1, 2, 3, 3)),
        Gaussian(torch.ones(1, 2, 3), None),
    ):
        assert Gaussian.recall(state) is None
        model.remember(state)
        assert Gaussian.recall(state) == model
        Gaussian.forget(state)
    assert state == {}


def test_rows_are_chosen_one_by_one() -> None:
    ones = Gaussian(torch.ones(2, 1, 3), torch.ones(2, 1, 3, 3))
    zeros = Gaussian(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3, 3))
    mixed = ones.where(torch.tensor([True, False]), zeros)
    assert mixed.covariance is not None
    assert mixed.mean.sum((1, 2)).tolist() == [3, 0]
    assert mixed.covariance.sum((1, 2, 3)).tolist() == [9, 0]
