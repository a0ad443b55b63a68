"""Two servers with the same small pool of blocks, one stock, one with a recipe: the same requests.

    python examples/side_by_side.py --recipe snapkv@0.4

Each server is vLLM's own OpenAI server, asked by the official client, all requests at once.
How many run together and how many are preempted comes from the servers' /metrics.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from kvhive.model.smollm2 import smollm2_folder
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BLOCK = 32
NAME = "smollm2"
DOCUMENT = Path(__file__).parents[3] / "examples" / "demo.md"
LETTERS = 5600  # of the document that each request brings, some 1,400 tokens
QUESTIONS = (
    "What is this text about?",
    "Name two people or places in the text.",
    "Which dates does the text mention?",
    "Summarise the text in two sentences.",
)
console = Console()


@dataclass
class Found:
    """What one server did."""

    running: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def main(
    recipe: Annotated[str, typer.Option("--recipe", "-r")] = "snapkv@0.4",
    requests: Annotated[int, typer.Option(min=1)] = 12,
    new: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 96,
    blocks: Annotated[int, typer.Option(help="Blocks of 32 tokens in the pool.")] = 145,
) -> None:
    """Start both servers, one after the other, and compare."""
    prompts = [_prompt(place) for place in range(requests)]
    stock = _serve_and_ask(None, prompts, new, blocks)
    ours = _serve_and_ask(recipe, prompts, new, blocks)
    _show(recipe, stock, ours, prompts)


def _prompt(place: int) -> str:
    text = DOCUMENT.read_text(encoding="utf-8")
    start = place * 433 % (len(text) - LETTERS)
    return f"{text[start : start + LETTERS]}\n\n{QUESTIONS[place % len(QUESTIONS)]}"


def _serve_and_ask(recipe: str | None, prompts: list[str], new: int, blocks: int) -> Found:
    port = _free_port()
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *_words(recipe, port, blocks)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
        )
        try:
            with console.status(f"starting vLLM with {recipe or 'no recipe'}"):
                _wait(server, port)
            return asyncio.run(_ask(port, prompts, new, recipe or "stock"))
        except RuntimeError:
            log.seek(0)
            console.print(log.read()[-3000:], markup=False)
            raise
        finally:
            server.terminate()
            server.wait(60)


_LAUNCH = "import sys; from kvhive_vllm.cli import run_vllm; run_vllm(sys.argv[1:])"


def _words(recipe: str | None, port: int, blocks: int) -> list[str]:
    """Of `vllm serve`, or of `kvhive-vllm serve` where there is a recipe."""
    from kvhive_vllm.cli import arguments

    words = f"--port {port} --host 127.0.0.1 --served-model-name {NAME} --dtype bfloat16".split()
    words += f"--max-model-len 2048 --block-size {BLOCK} --num-gpu-blocks-override {blocks}".split()
    words += ["--kv-cache-memory-bytes", "1073741824", "--enforce-eager", "--max-num-seqs", "32"]
    words += ["--no-enable-prefix-caching"]
    words = words if recipe is None else arguments(recipe, words)
    return ["serve", str(smollm2_folder()), *words]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError("the server has ended before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server is not ready after five minutes")


async def _ask(port: int, prompts: list[str], new: int, title: str) -> Found:
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    found, ended = Found(), asyncio.Event()
    watching = asyncio.create_task(_watch(port, found, ended))
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(title, total=len(prompts))

        async def one(prompt: str) -> tuple[str, int]:
            given = await client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=new,
                temperature=0,
                timeout=1800,
            )
            progress.advance(bar)
            assert given.usage is not None
            return given.choices[0].message.content or "", given.usage.completion_tokens

        said = await asyncio.gather(*[one(prompt) for prompt in prompts])
    found.seconds = time.perf_counter() - start
    found.answers = [text for text, _ in said]
    found.tokens = sum(count for _, count in said)
    ended.set()
    await watching
    found.metrics = await asyncio.to_thread(_metrics, port)
    await client.close()
    return found


async def _watch(port: int, found: Found, ended: asyncio.Event) -> None:
    """How many requests run, a few times a second."""
    while not ended.is_set():
        running = (await asyncio.to_thread(_metrics, port)).get("vllm:num_requests_running", 0.0)
        if running:
            found.running.append(running)
        await asyncio.sleep(0.25)


def _metrics(port: int) -> dict[str, float]:
    """All metrics, summed over labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    sums: dict[str, float] = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _show(recipe: str, stock: Found, ours: Found, prompts: list[str]) -> None:
    table = Table("", "stock vLLM", recipe, "x", title=f"{len(prompts)} requests, one pool")
    means = (sum(found.running) / max(1, len(found.running)) for found in (stock, ours))
    rows = [
        ("requests at once, mean", *means),
        ("requests at once, most", *(max(f.running, default=0.0) for f in (stock, ours))),
        ("tokens a second", *(f.tokens / f.seconds for f in (stock, ours))),
        ("seconds", stock.seconds, ours.seconds),
        ("preempted", *(f.metrics.get("vllm:num_preemptions_total", 0.0) for f in (stock, ours))),
        ("tokens dropped", 0.0, ours.metrics.get("kvhive_tokens_dropped_total", 0.0)),
        ("blocks freed", 0.0, ours.metrics.get("kvhive_blocks_freed_total", 0.0)),
    ]
    for name, one, two in rows:
        table.add_row(name, f"{one:,.1f}", f"{two:,.1f}", f"{two / one:.2f}" if one else "")
    console.print(table)
    answers = Table("question", "stock vLLM", recipe, title="answers", show_lines=True)
    for place in range(min(4, len(prompts))):
        question = prompts[place].rpartition("\n")[2]
        answers.add_row(question, *(_short(found.answers[place]) for found in (stock, ours)))
    console.print(answers)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + " ..."


if __name__ == "__main__":
    typer.run(main)
