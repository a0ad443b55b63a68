"""Which recipes are run, and why others are not."""

from __future__ import annotations

import pytest

import kvhive_vllm
from kvhive_vllm.recipes import SCHEDULER, WORKER, read

REFUSED = {
    "corm@128": "corm lets heads hold different numbers of tokens",
    "kv_compress@128": "kv_compress lets heads hold different",
    "scissorhands_percentile": "scissorhands_percentile lets heads hold",
    "h2o@128/ada": "ada lets heads or layers hold .* write h2o@128 ",
    "snapkv@128/pyramid": "pyramid lets heads or layers",
    "hive@0.4": "write hive@0.4/uniform",
    "hive@0.4/uniform": "hive reads the prompt a second time; switch that off",
    "kvzip@0.4/uniform": "kvzip reads the prompt a second time",
    "h2o@128+kivi": r"its pages hold keys and values as they are; leave \+kivi out",
    "balanced": "balanced|hive",
    "elastic@128": r"elastic folds tokens into others; switch that off \(merge=false\)",
    "l2norm(skip_layers=[0])@128": "holds other numbers of tokens in layer 0",
}


@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_what_an_engine_cannot_run_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(text)


def test_nonsense_is_refused_as_kvhive_does() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        kvhive_vllm.engine_args("nonsense@3")
    with pytest.raises(TypeError, match="expected a string"):
        kvhive_vllm.engine_args(3)  # type: ignore[arg-type]


def test_engine_arguments_are_the_three_options() -> None:
    assert kvhive_vllm.engine_args("h2o@1024") == {
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKER,
        "additional_config": {"kvhive": {"recipe": "h2o@1024"}},
    }
