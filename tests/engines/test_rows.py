"""Rows of a padded batch are read, scored and streamed as each would be alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvhive.engines.rows import AT_ONCE, Rows, padded
from kvhive.evaluation.scoring import Continuation, ModelRunner
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
def stage() -> ModelRunner:
    """The tiny model in float64, so that the order of sums does not show."""
    return ModelRunner(tiny.model().double())


def read(stage: ModelRunner, recipe: str, texts: list[list[int]], block: int | None = None) -> Rows:
    """All but the last token read as prompts, the last one as decoding would."""
    rows = Rows(stage, Recipe.parse(recipe))
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
    stage: ModelRunner, recipe: str, block: int | None
) -> None:
    scripts = torch.tensor([ids for _, ids in ANSWERS])
    logprobs, hits = read(stage, recipe, TEXTS, block).score(scripts, [row for row, _ in ANSWERS])
    for place, (row, _) in enumerate(ANSWERS):
        alone = read(stage, recipe, [TEXTS[row]], block).score(scripts[place : place + 1], [0])
        same((logprobs[place : place + 1], hits[place : place + 1]), alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_are_scored_as_voices_score_them(stage: ModelRunner, recipe: str) -> None:
    """Another way to the same: the prompt alone, its last token as the beginning of a script."""
    answer = letters(AT_ONCE + 9, seed=5)
    logprobs, hits = read(stage, recipe, TEXTS[:1]).score(torch.tensor([answer]), [0])
    (voice,) = stage.read(TEXTS[0][:-1], [Recipe.parse(recipe)])
    ((forced,),) = stage.force([voice], [Continuation((TEXTS[0][-1], *answer), start=1)])
    assert logprobs[0].tolist() == pytest.approx(forced.logprobs, abs=1e-4)
    assert hits[0].tolist() == list(forced.hits)


def test_scoring_leaves_the_rows_as_they_are(stage: ModelRunner) -> None:
    rows = read(stage, "h2o@70", TEXTS)
    scripts = torch.tensor([ids for _, ids in ANSWERS])
    asked = [row for row, _ in ANSWERS]
    first = rows.score(scripts, asked)
    assert torch.equal(rows.score(scripts, asked)[0], first[0])


def test_nothing_can_be_scored_before_something_is_read(stage: ModelRunner) -> None:
    with pytest.raises(ValueError, match="nothing was read yet"):
        Rows(stage, Recipe.parse("full")).score(torch.tensor([[1]]), [0])


@pytest.mark.parametrize("text", SMALL)
def test_texts_stream_as_each_alone(stage: ModelRunner, text: str) -> None:
    """Every policy; in float64, which each must be able to take."""
    recipe = Recipe.parse(text)
    ids, real = padded(TEXTS)
    logprobs, hits = Rows(stage, recipe).stream(ids, real, 32)
    for row, text in enumerate(TEXTS[:-1]):
        alone, real_alone = padded([text])
        told = Rows(stage, recipe).stream(alone, real_alone, 32)
        last = slice(1 - len(text), None)
        same((logprobs[row : row + 1, last], hits[row : row + 1, last]), told)


@torch.no_grad()
def test_a_stream_through_the_full_cache_is_the_plain_model(stage: ModelRunner) -> None:
    plain: LlamaForCausalLM = tiny.model().double()
    ids, real = padded(TEXTS[:1])
    logprobs, hits = Rows(stage, Recipe.parse("full")).stream(ids, real, 32)
    logits = plain(ids).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(logprobs[0], wanted, atol=1e-4)
    assert torch.equal(hits[0], logits.argmax(-1) == ids[0, 1:])
