"""The evaluator's engine: the tokens of `HiveCache`, up to an end or the limit."""

from __future__ import annotations

import pytest
from kvhive.evaluation.engine import Job, Question
from kvhive.recipe import Recipe

from kvhive_vllm.evaluation import OWN_PROCESS, SETTINGS, VllmKind
from tests.models import Tiny, prompts


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before, afterwards."""
    for name, value in (*SETTINGS.items(), (OWN_PROCESS, "1")):
        monkeypatch.setenv(name, value)


def test_answers_are_those_of_a_hive_cache(tiny: Tiny) -> None:
    """One answer is cut by an end, which is its last token; the others by their limits."""
    recipe = "h2o@0.4"
    texts, limits = prompts(150, 211, 97), (30, 12, 30)
    whole = [tiny.expected(recipe, text, limit) for text, limit in zip(texts, limits, strict=True)]
    end = whole[0][7]
    wanted = [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]
    kind = VllmKind()
    job = Job(str(tiny.folder), "float32", Recipe.parse(recipe), frozenset({end}), 260)
    engine = kind.start(job)
    try:
        pairs = zip(texts, limits, strict=True)
        given = engine.write([Question(tuple(text), limit) for text, limit in pairs])
    finally:
        engine.close()
    assert given == wanted
    assert len(given[0]) <= 8


def test_the_kind_says_what_it_is() -> None:
    kind = VllmKind()
    assert kind.version.startswith("0.")
    assert kind.device in ("cpu", "cuda")
    kind.check(Recipe.parse("snapkv@0.4"))
    with pytest.raises(ValueError, match=r"vLLM cannot run h2o@0\.4\+kivi"):
        kind.check(Recipe.parse("h2o@0.4+kivi"))
