"""Runs through an engine: the same rows from the same questions, and nothing it cannot know."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvhive.cli import app
from kvhive.evaluation import engine as engine_module
from kvhive.evaluation import engine_pool
from kvhive.evaluation.engine_runner import EngineRunner, held, token_bytes
from kvhive.evaluation.report.markdown import as_markdown
from kvhive.evaluation.report.run import Run
from kvhive.evaluation.results import RUN, read_rows, read_run
from kvhive.evaluation.scheduler import State, evaluate
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.settings import Settings
from kvhive.recipe import Recipe
from tests.evaluation.fake_engine import FakeKind

VALUES = "niah_multivalue(tokens=300, hay='prose')"
WORDS = "fwe(tokens=200)"
RECIPES = ["full", "h2o@70", "streaming_llm@0.4"]
BYTES = 2 * 2 * 2 * 8 * 4  # of a token: keys and values, layers, KV heads, width, float32


@pytest.fixture
def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    FakeKind.log.clear()
    point = EntryPoint("fake", "tests.evaluation.fake_engine:FakeKind", engine_module.GROUP)
    monkeypatch.setattr(engine_module, "entry_points", lambda group: [point])
    return Settings(
        model=str(folder),
        recipes=tuple(RECIPES[1:]),
        tasks=(VALUES, WORDS),
        modes=("aware",),
        limit=2,
        dtype="float32",
        engine="fake",
    )


def without_bytes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lost = {"bytes", "full_bytes", "bytes_end"}
    return [{name: row[name] for name in row.keys() - lost} for row in rows]


def test_rows_are_those_of_transformers(settings, tmp_path):
    rows = read_rows(evaluate(settings, tmp_path / "fake"))
    plain = replace(settings, engine="transformers")
    expected = read_rows(evaluate(plain, tmp_path / "transformers"))
    assert without_bytes(rows) == without_bytes(expected)
    assert len(rows) == 2 * 2 * 4
    assert any(row["kept_end"] < row["seen_end"] for row in rows)


def test_bytes_are_those_of_the_tokens_kept(settings, tmp_path):
    for row in read_rows(evaluate(settings, tmp_path / "run")):
        assert row["bytes"] == row["kept"] * BYTES
        assert row["bytes_end"] == row["kept_end"] * BYTES
        assert row["full_bytes"] == row["seen"] * BYTES


def test_one_engine_a_recipe_answers_all_questions(settings, tmp_path):
    """The full cache answers the floor's, too, of which two are the same."""
    evaluate(settings, tmp_path / "run")
    assert FakeKind.log == [
        step
        for recipe, questions in zip(RECIPES, "744", strict=True)
        for step in (("start", recipe), ("write", recipe, questions), ("close", recipe))
    ]


def test_engines_are_told_of_plugins(settings, tmp_path):
    """Their processes load them too."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("")
    evaluate(replace(settings, plugins=(str(plugin),)), tmp_path / "run")
    starts = [step[1:] for step in FakeKind.log if step[0] == "start"]
    assert starts == [(recipe, str(plugin)) for recipe in RECIPES]


def test_a_batch_begins_with_the_engine_that_is_open(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_pool.EnginePool, "size", 2)
    evaluate(settings, tmp_path / "small")
    assert [recipe for kind, recipe, *_ in FakeKind.log if kind == "start"] == [
        *RECIPES,
        *RECIPES[:2],
    ]


def test_batches_do_not_show(settings, tmp_path, monkeypatch):
    whole = read_rows(evaluate(settings, tmp_path / "whole"))
    monkeypatch.setattr(engine_pool.EnginePool, "size", 3)
    assert read_rows(evaluate(settings, tmp_path / "small")) == whole


def test_a_stopped_run_goes_on_and_its_engine_is_closed(settings, tmp_path, monkeypatch):
    whole = read_rows(evaluate(settings, tmp_path / "whole"))
    monkeypatch.setattr(engine_pool.EnginePool, "size", 2)

    def stop_after_two(state: State) -> None:
        if state.done == 2:
            raise KeyboardInterrupt

    FakeKind.log.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings, tmp_path / "run", progress=stop_after_two)
    kinds = [kind for kind, *_ in FakeKind.log]
    assert kinds.count("start") == kinds.count("close") == 3
    FakeKind.log.clear()
    states: list[State] = []
    evaluate(settings, tmp_path / "run", progress=states.append)
    assert [state.done for state in states if not state.note] == [2, 3, 4]
    assert next(words for kind, *words in FakeKind.log if kind == "write") == ["full", "3"]
    assert read_rows(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "vllm"}, r"no engine 'vllm' is installed; there is transformers, fake; for "),
        ({"modes": ("agnostic", "aware")}, r"mode agnostic cannot be measured through fake, which"),
        ({"modes": ("stream",)}, r"mode stream cannot be measured through fake.*--mode aware"),
        ({"hold": True}, r"--hold is nothing for fake: it goes on evicting"),
        ({"block": 64}, r"--prefill-block is nothing for fake: it compresses a prompt once"),
        ({"threads": 1}, r"--threads is nothing for fake"),
        ({"device": "meta"}, r"fake runs on cpu here, not on meta: give --device cpu"),
        ({"recipes": ("tova@70",)}, r"fake cannot run tova"),
        ({"model": "small.gguf"}, r"'small.gguf' is a GGUF file; give a model as a folder"),
        (
            {"tasks": (WORDS, "passkey(hay='prose', lengths=(300,))")},
            r"passkey\(.*\) aware, item 0: fake tells no log probabilities.*qa10_written",
        ),
        ({"tasks": ("ruler_qa(tokens=200)",)}, r"ruler_qa.*fake tells no log probabilities"),
        ({"tasks": ("vt(hay='prose', tokens=200)",)}, r"vt.*fake tells no log probabilities"),
        (
            {"tasks": ("kv(pairs=2, asked=2, turns=True)",)},
            r"kv.*fake tells no log probabilities of given answers",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(settings, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(settings, **change), tmp_path / "run")
    assert FakeKind.log == []
    assert not (tmp_path / "run" / RUN).exists()


@pytest.mark.parametrize("more", [{"jobs": 2}, {"ray": "auto"}, {"loaded": ("model", "tokenizer")}])
def test_it_works_alone(settings, tmp_path, more, network, tokenizer):
    if "loaded" in more:
        more = {"loaded": (network, tokenizer)}
    with pytest.raises(ValueError, match=r"fake loads the model itself and works on many items"):
        evaluate(settings, tmp_path / "run", **more)


def test_turns_are_refused():
    runner = EngineRunner("fake", 1)
    with pytest.raises(ValueError, match=r"turns on one cache cannot be measured; ask the"):
        runner.advance(runner.read((1, 2), [Recipe.parse("full")]), (3,))


def test_the_run_says_which_engine(settings, tmp_path):
    out = evaluate(settings, tmp_path / "run")
    run = read_run(out)
    assert run["settings"]["engine"] == "fake"
    assert run["facts"]["engine"] == "fake 1.2"
    text = as_markdown(Run.read(out), "kvhive report")
    assert "engine fake 1.2, " in text
    assert "of an engine are those of the keys and values kept" in text
    with pytest.raises(ValueError, match=r"holds a run with engine 'fake', not 'transformers'"):
        evaluate(replace(settings, engine="transformers"), out)


def test_runs_from_before_there_were_engines_go_on(settings, tmp_path):
    plain = replace(settings, engine="transformers")
    out = evaluate(plain, tmp_path / "run")
    run = json.loads((out / RUN).read_bytes())
    del run["settings"]["engine"]
    (out / RUN).write_text(json.dumps(run), encoding="utf-8")
    assert read_run(out)["settings"]["engine"] == "transformers"
    evaluate(plain, out)


def test_the_command_takes_the_modes_that_the_engine_can_do(settings, tmp_path):
    words = ["evaluate", "--model", settings.model, "--dtype", "float32", "--limit", "1"]
    words += ["-t", WORDS, "-r", "h2o@70", "--engine", "fake", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert read_run(tmp_path / "run")["settings"]["modes"] == ["aware"]


@pytest.mark.parametrize("recipe", ["full", "h2o@0.4", "streaming_llm@80", "buzz@0.4"])
@pytest.mark.parametrize(("prompt", "decoded"), [(70, 0), (301, 0), (150, 45)])
def test_what_is_held_is_what_a_cache_holds(network, recipe, prompt, decoded):
    runner = ModelRunner(network)
    (sequence,) = runner.read([1 + place % 250 for place in range(prompt)], [Recipe.parse(recipe)])
    if decoded:
        runner.generate([sequence], decoded + 1, lambda answer: False)
    size = token_bytes(network)
    found = held(Recipe.parse(recipe), prompt, decoded, size)
    assert found.seen == sequence.end.seen == prompt + decoded
    assert found.kept == sequence.end.kept
    assert found.full_nbytes == sequence.end.full_nbytes
    assert found.nbytes <= sequence.end.nbytes
