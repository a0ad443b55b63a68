"""Engines with a recipe and without may follow each other in one process."""

from __future__ import annotations

from pathlib import Path

from tests.models import Tiny, prompts
from tests.test_processes import told

SCRIPT = """
import json, sys
from pathlib import Path
from tests.models import Tiny, generated, greedy
job = json.loads(sys.argv[1])
if __name__ == "__main__":
    given = []
    for recipe in (None, job["recipe"], None):
        with Tiny(Path(job["folder"])).engine(recipe) as llm:
            given.append(generated(llm, job["texts"], greedy(job["new"])))
    print("given", json.dumps(given))
"""


def test_a_recipe_may_come_after_stock_vllm_and_before_it(tiny: Tiny, tmp_path: Path) -> None:
    texts, new, recipe = prompts(120), 20, "h2o@80"
    job = {"folder": str(tiny.folder), "recipe": recipe, "texts": texts, "new": new}
    first, ours, last = told(SCRIPT, job, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert first == last
    assert ours == [tiny.expected(recipe, text, new) for text in texts]
    assert ours != first
