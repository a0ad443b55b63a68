"""A tiny model of random weights, engines that run it, and what `HiveCache` makes of it."""

from __future__ import annotations

import os

# Engines run in this process, on one thread, and look nothing up.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.models import Tiny, make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A Llama of 3 layers with 4 query heads over 2 KV heads."""
    return make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
