"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from beartype import BeartypeConf
from beartype.claw import beartype_package
from hypothesis import settings

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("kvhive", deadline=None)
settings.load_profile("kvhive")

# Without a GPU, Triton's programs run in its interpreter. Triton reads this when it is imported,
# which transformers does by way of torch's compiler.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Types are checked while the tests run, and only then: before anything of ours is imported. What
# imports a type for mypy alone, so that a command starts fast, is left out, and so are actors: Ray
# gives their methods signatures of its own. Triton reads the source of its programs.
UNCHECKED = (
    "cli",
    "comparison",
    "html",
    "inference",
    "kernels.triton_columns_programs",
    "kernels.triton_packed_programs",
    "kernels.triton_pieces",
    "kernels.triton_programs",
    "model.chat",
    "model.loading",
    "model.pretrained",
    "model.smollm2",
    "model.tokenizers",
    "evaluation.ray_workers",
)
beartype_package(
    "kvhive",
    conf=BeartypeConf(
        claw_is_pep526=False,
        claw_skip_package_names=tuple(f"kvhive.{name}" for name in UNCHECKED),
    ),
)

from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

import kvhive.model.loading  # noqa: E402
from kvhive.allocations import ALLOCATIONS  # noqa: E402
from kvhive.budget import Budget  # noqa: E402
from kvhive.policies import POLICIES  # noqa: E402
from kvhive.recipe import Recipe  # noqa: E402
from kvhive.stores import STORES  # noqa: E402
from tests.browser import browser, visit  # noqa: E402, F401
from tests.support import tiny_llama  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--vectors DIR`: replay other recorded cases than the copies in tests/vectors."""
    parser.addoption(
        "--vectors",
        metavar="DIR",
        default=None,
        help="replay every recorded case below DIR instead of those in tests/vectors",
    )


torch.set_num_threads(1)  # tiny tensors: threads would only get in each other's way


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes and their parts without the type checks of the test run, as users have them."""
    for cls in (Recipe, Budget, *POLICIES.values(), *ALLOCATIONS.values(), *STORES.values()):
        for name, method in list(vars(cls).items()):
            inner = getattr(method, "__func__", method)
            if hasattr(inner, "__wrapped__"):
                kind = classmethod if isinstance(method, classmethod) else _same
                monkeypatch.setattr(cls, name, kind(inner.__wrapped__))


def _same(method: Any) -> Any:
    return method


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
