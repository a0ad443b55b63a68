"""Rows of a padded batch are read, scored and streamed as each would be alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvhive.engines.rows import AT_ONCE, Rows, padded
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.sequences import Continuation
from kvhive.recipe import Recipe
from tests.cli import tiny
from tests.contract.recipes import SMALL

LENGTHS = (150, 97, 2, 1)


def letters(length: int, seed: int) -> list[int]:
    """Ids below the special ones, none twice: equal keys would leave policies with ties."""
    return torch.randperm(250, generator=torch.Generator().manual_seed(seed))[:length].tolist()


TEXTS = [letters(length, length) for length in LENGTHS]
ANSWERS = [(0, (9, 8, 7)), (1, (40, 41, 42)), (0, (5, 6, 9)), (3, (1, 2, 3)), (2, (7, 7, 7))]
RECIPES = ["full", "h2o@70", "streaming_llm@40", "snapkv(decode=none)@60", "buzz@80", "buzz@0.4"]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """The tiny model in float64, so that the order of sums does not show."""
    return ModelRunner(tiny.model().double())


def read(
    runner: ModelRunner, recipe: str, texts: list[list[int]], block: int | None = None
) -> Rows:
    """All but the last token read as prompts, the last one as decoding would."""
    rows = Rows(runner.driver, Recipe.parse(recipe))
    ids, real = padded(texts)
    rows.read(ids[:, :-1], real[:, :-1], block)
    rows.follow(ids[:, -1:], real[:, -1:])
    return rows


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[1], other[1])
    assert torch.allclose(one[0], other[0], atol=1e-4)


@pytest.mark.parametrize("block", [None, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_after_rows_are_as_after_each_alone(
    runner: ModelRunner, recipe: str, block: int | None
) -> None:
    continuations = torch.tensor([ids for _, ids in ANSWERS])
    logprobs, hits = read(runner, recipe, TEXTS, block).score(
        continuations, [row for row, _ in ANSWERS]
    )
    for place, (row, _) in enumerate(ANSWERS):
        alone = read(runner, recipe, [TEXTS[row]], block).score(
            continuations[place : place + 1], [0]
        )
        same((logprobs[place : place + 1], hits[place : place + 1]), alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_are_scored_as_sequences_score_them(runner: ModelRunner, recipe: str) -> None:
    """Another way to the same: the prompt alone, its last token the first of a continuation."""
    answer = letters(AT_ONCE + 9, seed=5)
    logprobs, hits = read(runner, recipe, TEXTS[:1]).score(torch.tensor([answer]), [0])
    (sequence,) = runner.read(TEXTS[0][:-1], [Recipe.parse(recipe)])
    ((forced,),) = runner.force([sequence], [Continuation((TEXTS[0][-1], *answer), start=1)])
    assert logprobs[0].tolist() == pytest.approx(forced.logprobs, abs=1e-4)
    assert hits[0].tolist() == list(forced.hits)


def test_scoring_leaves_the_rows_as_they_are(runner: ModelRunner) -> None:
    rows = read(runner, "h2o@70", TEXTS)
    continuations = torch.tensor([ids for _, ids in ANSWERS])
    asked = [row for row, _ in ANSWERS]
    first = rows.score(continuations, asked)
    assert torch.equal(rows.score(continuations, asked)[0], first[0])


def test_nothing_can_be_scored_before_something_is_read(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="nothing was read yet"):
        Rows(runner.driver, Recipe.parse("full")).score(torch.tensor([[1]]), [0])


@pytest.mark.parametrize("text", SMALL)
def test_texts_stream_as_each_alone(runner: ModelRunner, text: str) -> None:
    """Every policy; in float64, which each must be able to take."""
    recipe = Recipe.parse(text)
    ids, real = padded(TEXTS)
    logprobs, hits = Rows(runner.driver, recipe).stream(ids, real, 32)
    for row, text in enumerate(TEXTS[:-1]):
        alone, real_alone = padded([text])
        got = Rows(runner.driver, recipe).stream(alone, real_alone, 32)
        last = slice(1 - len(text), None)
        same((logprobs[row : row + 1, last], hits[row : row + 1, last]), got)


@torch.no_grad()
def test_a_stream_through_the_full_cache_is_the_plain_model(runner: ModelRunner) -> None:
    plain: LlamaForCausalLM = tiny.model().double()
    ids, real = padded(TEXTS[:1])
    logprobs, hits = Rows(runner.driver, Recipe.parse("full")).stream(ids, real, 32)
    logits = plain(ids).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(logprobs[0], wanted, atol=1e-4)
    assert torch.equal(hits[0], logits.argmax(-1) == ids[0, 1:])
