"""Engines with processes of their own: for their core, and for two ranks of tensor parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import Tiny, prompts

SCRIPT = """
import json, sys
from pathlib import Path
from tests.models import Tiny, generated, greedy
job = json.loads(sys.argv[1])
if __name__ == "__main__":
    with Tiny(Path(job["folder"])).engine(job["recipe"], **job["options"]) as llm:
        print("given", json.dumps(generated(llm, job["texts"], greedy(job["new"]))))
"""


def told(script: str, job: dict[str, Any], folder: Path, **settings: str) -> Any:
    """What a script prints behind the word `given`."""
    place = folder / "run.py"
    place.write_text(script)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(place), json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("given ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("given "))


def in_a_process(tiny: Tiny, recipe: str, texts: list[list[int]], new: int, **options: Any) -> Any:
    """What an engine gives whose core is a process; the test's own engines are not."""
    job = {
        "folder": str(tiny.folder),
        "recipe": recipe,
        "texts": texts,
        "new": new,
        "options": options,
    }
    return told(SCRIPT, job, tiny.folder.parent, VLLM_ENABLE_V1_MULTIPROCESSING="1")


def test_the_core_of_an_engine_may_be_a_process(tiny: Tiny) -> None:
    texts, new = prompts(150, 211), 40
    given = in_a_process(tiny, "buzz@0.4", texts, new)
    assert given == [tiny.expected("buzz@0.4", text, new) for text in texts]


@pytest.mark.parametrize("recipe", ["h2o@80", "streaming_llm@80"])
def test_two_ranks_give_what_one_gives(tiny: Tiny, recipe: str) -> None:
    """Each holds one of the two KV heads, which choose by themselves."""
    texts, new = prompts(150, 97), 40
    given = in_a_process(
        tiny, recipe, texts, new, tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    assert given == [tiny.expected(recipe, text, new) for text in texts]
