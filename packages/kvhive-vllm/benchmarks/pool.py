"""What a fixed pool of blocks serves, with and without recipes: requests at once, tokens a second.

    python benchmarks/pool.py --recipe stock --recipe streaming_llm@0.4 --recipe h2o@0.4

Every recipe runs in an engine of its own, one after the other, with the same pool and prompts.
Seconds are CPU seconds of the engine's process and seconds on the wall.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from typing import Annotated, Any

import typer

STOCK = "stock"


def main(
    recipe: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    model: Annotated[str, typer.Option(help="A folder, or smollm2.")] = "smollm2",
    requests: Annotated[int, typer.Option(min=1)] = 12,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 2000,
    new: Annotated[int, typer.Option(help="Tokens that each request writes.", min=1)] = 256,
    blocks: Annotated[int, typer.Option(help="Blocks of 32 tokens in the pool.")] = 196,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    dtype: str = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Runs of each recipe, taken in turns.")] = 1,
) -> None:
    """Measure each recipe; ratios are to the first one of the same round."""
    recipes = recipe or [STOCK, "streaming_llm@0.4", "snapkv@0.4", "h2o@0.4"]
    job = {
        "model": model,
        "requests": requests,
        "prompt": prompt,
        "new": new,
        "blocks": blocks,
        "dtype": dtype,
    }
    head = (
        "recipe",
        "at once",
        "peak",
        "steps",
        "preempted",
        "wall s",
        "CPU s",
        "tok/s",
        "x wall",
        "x CPU",
    )
    typer.echo(" | ".join(f"{name:>10}" for name in head))
    for _ in range(rounds):
        first: dict[str, Any] | None = None
        for one in recipes:
            found = _in_a_process({**job, "recipe": one}, threads)
            first = first or found
            cells = (
                f"{found['mean']:.2f}",
                found["peak"],
                found["steps"],
                found["preempted"],
                f"{found['wall']:.1f}",
                f"{found['cpu']:.1f}",
                f"{requests * new / found['wall']:.2f}",
                f"{first['wall'] / found['wall']:.2f}",
                f"{first['cpu'] / found['cpu']:.2f}",
            )
            typer.echo(" | ".join([f"{one:>10}", *(f"{cell:>10}" for cell in cells)]))
        typer.echo(
            json.dumps(
                {
                    "model": model,
                    "requests": requests,
                    "prompt": prompt,
                    "new": new,
                    "blocks": blocks,
                }
            )
        )


def _in_a_process(job: dict[str, Any], threads: int) -> dict[str, Any]:
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",
    }
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (job,))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, from the first request to the last token."""
    from vllm import LLM, SamplingParams

    import kvhive_vllm

    prompt, new = job["prompt"], job["new"]
    extra = {} if job["recipe"] == STOCK else kvhive_vllm.engine_args(job["recipe"])
    llm = LLM(
        model=folder(job["model"]),
        dtype=job["dtype"],
        enforce_eager=True,
        block_size=32,
        max_model_len=prompt + new + 32,
        num_gpu_blocks_override=job["blocks"],
        max_num_seqs=64,
        kv_cache_memory_bytes=2**30,
        max_num_batched_tokens=prompt + 304,
        seed=0,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **extra,
    )
    engine, params = (
        llm.llm_engine,
        SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False),
    )
    for place, tokens in enumerate(texts(llm, job["requests"], prompt)):
        engine.add_request(str(place), {"prompt_token_ids": tokens}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    running: list[int] = []
    wall, cpu = time.perf_counter(), time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
        running.append(len(scheduler.running))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    preempted = next(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")
    return {
        "mean": sum(running) / len(running),
        "peak": max(running),
        "steps": len(running),
        "preempted": int(preempted),
        "wall": wall,
        "cpu": cpu,
    }


def folder(model: str) -> str:
    """Where a model lies that vLLM can load."""
    if model != "smollm2":
        return model
    from kvhive.model.smollm2 import smollm2_folder

    return str(smollm2_folder())


def texts(llm: Any, count: int, tokens: int) -> list[list[int]]:
    """Different parts of the document that comes with kvhive, over and over if it is too short."""
    from pathlib import Path

    text = (Path(__file__).parents[3] / "examples" / "demo.md").read_text(encoding="utf-8")
    ids = llm.get_tokenizer()(text)["input_ids"]
    whole = ids * (1 + (count * 211 + tokens) // len(ids))
    return [whole[place * 211 : place * 211 + tokens] for place in range(count)]


if __name__ == "__main__":
    typer.run(main)
