"""Options and fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvhive.model.loading
from tests.support import tiny_llama


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--vectors DIR`: replay other recorded cases than the copies in tests/vectors."""
    parser.addoption(
        "--vectors",
        metavar="DIR",
        default=None,
        help="replay every recorded case below DIR instead of those in tests/vectors",
    )


torch.set_num_threads(1)  # tiny tensors: threads would only get in each other's way


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """A tiny random Llama for the cache to attach to."""
    return tiny_llama()


@pytest.fixture(scope="session")
def stock() -> PreTrainedModel:
    """The same weights, never attached: transformers' own sdpa."""
    return tiny_llama()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in bfloat16, shared by all tests: leave it as you found it."""
    try:
        return kvhive.model.loading.load("smollm2")
    except ImportError as error:
        pytest.skip(str(error))
