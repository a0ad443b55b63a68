"""The OpenAI server, asked by the official client: streams, metrics, and what it says at start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from tests.models import Tiny, prompts

RECIPE, NEW = "h2o@80", 40


@contextmanager
def _serving(tiny: Tiny, name: str, *more: str) -> Iterator[tuple[int, Path]]:
    """A server's port, and its log."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = tiny.folder.parent / f"{name}.log"
    words = f"serve {tiny.folder} --recipe {RECIPE} --port {port} --host 127.0.0.1".split()
    words += [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--block-size",
        "32",
        "--max-model-len",
        "512",
    ]
    words += ["--kv-cache-memory-bytes", "134217728", "--served-model-name", "tiny"]
    words += ["--skip-tokenizer-init", *more]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvhive_vllm", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
        )
        try:
            _wait(process, port, log)
            yield port, log
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[tuple[int, Path]]:
    """One engine."""
    with _serving(tiny, "server") as found:
        yield found


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text()[-4000:])


def _client(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def _metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith("kvhive")]
    found: dict[str, float] = defaultdict(float)  # summed over engines
    for line in lines:
        name, value = line.rsplit(" ", 1)
        found[name.partition("{")[0]] += float(value)
    return found


def _tokens(port: int, text: list[int]) -> list[int]:
    body = {"ignore_eos": True, "return_token_ids": True, "detokenize": False}
    stream = _client(port).completions.create(
        model="tiny", prompt=text, max_tokens=NEW, temperature=0, stream=True, extra_body=body
    )
    tokens: list[int] = []
    for event in stream:
        for choice in event.choices:
            tokens += (choice.model_extra or {}).get("token_ids") or []
    return tokens


def test_streams_are_those_of_a_hive_cache(server: tuple[int, Path], tiny: Tiny) -> None:
    text = prompts(150)[0]
    assert _tokens(server[0], text) == tiny.expected(RECIPE, text, NEW)


def test_metrics_count_what_went(server: tuple[int, Path]) -> None:
    before = _metrics(server[0])
    assert len(_tokens(server[0], prompts(200, seed=9)[0])) == NEW
    after = _metrics(server[0])
    gone = after["kvhive_tokens_dropped_total"] - before["kvhive_tokens_dropped_total"]
    assert 200 + NEW - 80 - 4 <= gone <= 200 + NEW - 78
    assert after["kvhive_blocks_freed_total"] - before["kvhive_blocks_freed_total"] >= 4
    assert after["kvhive_blocks_per_request"] >= 0


def test_a_client_that_hangs_up_leaves_nothing(server: tuple[int, Path], tiny: Tiny) -> None:
    stream = _client(server[0]).completions.create(
        model="tiny",
        prompt=prompts(120, seed=3)[0],
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True, "detokenize": False},
    )
    next(iter(stream))
    stream.close()
    text = prompts(97)[0]
    assert _tokens(server[0], text) == tiny.expected(RECIPE, text, NEW)


def test_the_log_says_once_what_is_on(server: tuple[int, Path]) -> None:
    said = [line for line in server[1].read_text().splitlines() if "kvhive: " in line]
    on = [line for line in said if f"kvhive: {RECIPE} in 3 layers" in line]
    assert len(on) == 1
    assert "a prompt of 512 tokens frees 13 of 16 blocks" in on[0]
    assert sum("are set aside for slots and scratch" in line for line in said) == 1


def test_engines_of_a_data_parallel_group_count_each_for_themselves(tiny: Tiny) -> None:
    """Two engines behind two servers; each request lives in one of them."""
    texts = prompts(*[150 + place for place in range(4)])
    with _serving(tiny, "parallel", "--data-parallel-size", "2") as (port, _):
        with ThreadPoolExecutor(4) as pool:
            given = list(pool.map(lambda text: _tokens(port, text), texts))
        metrics = _metrics(port)
    assert given == [tiny.expected(RECIPE, text, NEW) for text in texts]
    least, most = (sum(len(text) + NEW - kept for text in texts) for kept in (84, 78))
    assert least <= metrics["kvhive_tokens_dropped_total"] <= most
    assert metrics["kvhive_blocks_freed_total"] >= 4
