"""A tiny model that reads bytes, and what tasks need to make items for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvhive.evaluation.data.source import Builtin
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.inference.generation import end_tokens
from kvhive.model.chat import ChatFormat
from kvhive.recipe import Recipe
from tests.cli import tiny

TRAINED_LENGTH = 6000
# Ray is an extra: its tests are collected where it is installed.
collect_ignore = ["test_ray.py"] if find_spec("ray") is None else []


def long_model() -> LlamaForCausalLM:
    """`tiny.model`, as if trained on longer texts."""
    model = tiny.model()
    model.config.max_position_embeddings = TRAINED_LENGTH
    return model


@pytest.fixture(scope="session")
def network() -> LlamaForCausalLM:
    """The model, in float64, so that the order of sums does not show."""
    return long_model().double()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte."""
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer as a folder that can be loaded by name."""
    place = tmp_path_factory.mktemp("model")
    long_model().save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def context(tokenizer: PreTrainedTokenizerFast) -> TaskContext:
    """Made-up data, seed 0."""
    return TaskContext(Builtin(), tokenizer, 0)


@pytest.fixture
def tested(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> ModelUnderTest:
    """The full cache and two recipes, one of which evicts while decoding."""
    recipes = tuple(map(Recipe.parse, ("full", "h2o@70", "streaming_llm@80")))
    ends = end_tokens(network, tokenizer)
    return ModelUnderTest(ModelRunner(network), ChatFormat.of(tokenizer), ends, recipes)
