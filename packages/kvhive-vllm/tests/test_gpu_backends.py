"""Attention for GPUs: what vLLM is told of it, and Triton's, interpreted. None has run on a GPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvhive_vllm import backends
from kvhive_vllm.backends.reporting import Reporting, pages_of
from kvhive_vllm.recipes import KEY
from tests.interpreted import Job, run
from tests.models import make, prompts

NAMES = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
VOTING = ("h2o@80", "snapkv@80", "expected_attention@80")


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
    assert issubclass(ours.get_impl_cls(), Reporting)
    assert issubclass(ours.get_impl_cls(), own.get_impl_cls())
    assert issubclass(ours.get_builder_cls(), own.get_builder_cls())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", [None, "keydiff@80", *VOTING])
def test_attention_that_votes_is_in_no_graph(name: str, recipe: str | None) -> None:
    builders = [one for key, one in vars(module(name)).items() if key.endswith("MetadataBuilder")]
    own, ours = (one.get_cudagraph_support(config(recipe), None) for one in builders)
    assert own != AttentionCGSupport.NEVER
    assert ours == (AttentionCGSupport.NEVER if recipe in VOTING else own)


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


def test_tokens_of_attention_in_triton_are_those_of_a_hive_cache(tmp_path: Path) -> None:
    """Interpreted, which is slow: one layer, few tokens."""
    tiny = make(tmp_path / "model", num_hidden_layers=1)
    text, new, recipe = prompts(40)[0], 5, "h2o@20"
    job = Job(recipe, [text], new, attention="TRITON_ATTN", options={"block_size": 16})
    (outcome,) = run(tiny.folder, [job])
    assert outcome.pages == "GpuPages"
    assert outcome.given == [tiny.expected(recipe, text, new)]
    assert outcome.free == outcome.total
