"""Attention for GPUs: what vLLM is told of it here, and Triton's in its interpreter. None has run on
a GPU.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvhive_vllm import backends
from kvhive_vllm.backends.reporting import Reporting, pages_of
from kvhive_vllm.recipes import KEY
from tests.interpreted import Job, Outcome, run
from tests.models import Tiny, prompts

NAMES = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


def module(name: str) -> ModuleType:
    """Of a backend. None needs the library of another."""
    if name == "FLASHINFER":
        pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
    return import_module(backends.OURS[AttentionBackendEnum[name]].rpartition(".")[0])


def config(recipe: str | None) -> Any:
    """As much of vLLM's as a builder looks at."""
    return SimpleNamespace(
        additional_config={} if recipe is None else {KEY: {"recipe": recipe}},
        parallel_config=SimpleNamespace(decode_context_parallel_size=2),
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_stands_for_the_engines_own(name: str) -> None:
    module(name)
    place = AttentionBackendEnum[name]
    own = place.get_class()
    backends.register()
    try:
        ours = place.get_class()
    finally:
        for one in backends.OURS:
            one.clear_override()
    assert issubclass(ours, own)
    assert ours.get_name() == name
    assert issubclass(ours.get_impl_cls(), (Reporting, own.get_impl_cls()))
    assert issubclass(ours.get_impl_cls(), own.get_impl_cls())
    assert issubclass(ours.get_builder_cls(), own.get_builder_cls())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", [None, "h2o@80", "snapkv@80", "expected_attention@80", "keydiff@80"])
def test_attention_that_votes_is_in_no_graph(name: str, recipe: str | None) -> None:
    (builder,) = (
        one for one in vars(module(name)).values() if getattr(one, "__name__", "").startswith("Hive")
        and hasattr(one, "get_cudagraph_support")
    )
    votes = recipe not in (None, "keydiff@80")
    asked: AttentionCGSupport = builder.get_cudagraph_support(config(recipe), None)
    own = builder.__mro__[2].get_cudagraph_support(config(recipe), None)
    assert own != AttentionCGSupport.NEVER
    assert asked == (AttentionCGSupport.NEVER if votes else own)


@pytest.mark.parametrize("second", [False, True])
def test_then_vllm_captures_what_lies_between(second: bool) -> None:
    """Its own choice of graphs, with its default on GPUs."""
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
    )
    compilation.set_splitting_ops_for_v1("", 1)
    chosen = compilation.resolve_cudagraph_mode_and_sizes(
        AttentionCGSupport.NEVER, "ours", use_v2_model_runner=second
    )
    assert chosen == CUDAGraphMode.PIECEWISE


def test_attention_that_does_not_report_is_refused() -> None:
    layer = SimpleNamespace(impl=SimpleNamespace())
    with pytest.raises(ValueError, match=r"does not serve SimpleNamespace.*--attention-backend"):
        pages_of(layer, 16)


# Interpreted attention is slow: few tokens, and budgets they outgrow.
JOBS = {
    recipe: Job(recipe, prompts(40, 23), 7, attention="TRITON_ATTN", options={"block_size": 16})
    for recipe in ("h2o@20", "streaming_llm@20")
}


@pytest.fixture(scope="module")
def outcomes(tiny: Tiny) -> dict[str, Outcome]:
    return dict(zip(JOBS, run(tiny.folder, list(JOBS.values())), strict=True))


@pytest.mark.parametrize("recipe", JOBS)
def test_tokens_of_attention_in_triton_are_those_of_a_hive_cache(
    tiny: Tiny, outcomes: dict[str, Outcome], recipe: str
) -> None:
    job, outcome = JOBS[recipe], outcomes[recipe]
    assert outcome.pages == "GpuPages"
    assert outcome.given == [tiny.expected(recipe, text, job.new) for text in job.texts]
    assert outcome.free == outcome.total
