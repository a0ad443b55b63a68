"""lm-evaluation-harness on compressed caches, with tasks and data from local files."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from kvhive.cache.hive_cache import HiveCache
from kvhive.cli import app
from kvhive.engines.lm_eval import KvhiveLM
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.sequences import Continuation
from kvhive.recipe import Recipe
from tests.cli import tiny

CONTEXT = "The bees are at home in the old mill by the river. " * 4
PAIRS = [
    (CONTEXT + "Where are they?", " at home"),
    ("Short one:", " yes and more"),
    (CONTEXT + "Where are they?", " away"),
    (CONTEXT[:90], "m"),
    ("", "Bees"),
    ("a", "b"),
]
STOPPED = {"until": ["\n\n"], "max_gen_toks": 10}
LOSSY = ["h2o@70", "streaming_llm@40", "snapkv(decode=none)@60", "buzz@80"]
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn of much


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """The harness logs every step."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def ours(recipe: str, batch_size: int = 1, **options: Any) -> KvhiveLM:
    model = tiny.model().double()
    return KvhiveLM(model, recipe, tokenizer=tiny.tokenizer(), batch_size=batch_size, **options)


def theirs(**options: Any) -> HFLM:
    return HFLM(tiny.model().double(), tokenizer=tiny.tokenizer(), batch_size=1, **options)


def requests(*args: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in args]


def scored(model: HFLM, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests(*pairs), disable_tqdm=True)


def rolled(model: HFLM, *texts: str) -> list[float]:
    return model.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)


def written(model: HFLM, *contexts: str, **asked: Any) -> list[str]:
    pairs = ((context, {**STOPPED, **asked}) for context in contexts)
    return model.generate_until(requests(*pairs), disable_tqdm=True)


def same(one: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    assert [score for score, _ in one] == pytest.approx([score for score, _ in other], abs=1e-3)


# ---- nothing lost: as the harness itself ---------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full", "buzz@1.0"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_everything_kept_answers_score_as_in_the_harness(recipe: str, batch_size: int) -> None:
    same(scored(ours(recipe, batch_size)), scored(theirs()))


@pytest.mark.parametrize("recipe", ["full", "buzz@1.0"])
def test_with_everything_kept_texts_score_as_in_the_harness(recipe: str) -> None:
    texts = (CONTEXT, "Bees.", CONTEXT[:120])
    for options in ({}, {"max_length": 50}):  # in one window, and in several
        got = rolled(ours(recipe, 2, **options), *texts)
        assert got == pytest.approx(rolled(theirs(**options), *texts), abs=1e-3)


@pytest.mark.parametrize(
    "asked", [{}, {"until": ["e", "qu"]}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}]
)
def test_with_everything_kept_texts_are_written_as_in_the_harness(asked: dict[str, Any]) -> None:
    """Its own arguments for sampling and search are honoured."""
    for model_and_texts in ((CONTEXT, "Short one:"), ("Bees",)):
        torch.manual_seed(0)
        expected = [written(theirs(), text, **asked)[0] for text in model_and_texts]
        for recipe in ("full", "buzz@1.0"):
            torch.manual_seed(0)
            model = ours(recipe)
            assert [written(model, text, **asked)[0] for text in model_and_texts] == expected


def test_contexts_that_are_too_long_lose_their_beginning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(CONTEXT, " at home"), (CONTEXT, " far away, they say"), ("Short", " one")]
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="lm_eval.kvhive"):
        cut = scored(ours("full", 4, max_length=60), pairs)
    assert "2 of 3 contexts are too long for the model's 60 tokens" in caplog.text
    same(cut, scored(theirs(max_length=60), pairs))
    assert written(ours("full", max_length=60), CONTEXT) == written(theirs(max_length=60), CONTEXT)


# ---- something lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", LOSSY)
def test_answers_are_scored_on_what_the_recipe_kept(recipe: str) -> None:
    """All but the last token of a context is compressed; the rest comes as decoding would."""
    model = ours(recipe, 4)
    runner = ModelRunner(model.model)
    for (context, answer), (score, _) in zip(PAIRS[:4], scored(model, PAIRS[:4]), strict=True):
        *ids, last = model.tok_encode(context)
        (sequence,) = runner.read(ids, [Recipe.parse(recipe)])
        script = Continuation((last, *model.tok_encode(answer)), start=1)
        ((forced,),) = runner.force([sequence], [script])
        assert score == pytest.approx(sum(forced.logprobs), abs=1e-3)
    lossless = [score for score, _ in scored(ours("full"))]
    assert lossless != pytest.approx([score for score, _ in scored(model)], abs=1e-2)


def test_even_an_answer_of_one_token_feels_the_loss() -> None:
    pairs = [(CONTEXT, "x"), (CONTEXT, "y")]
    (x, _), (y, _) = scored(ours("h2o@70"), pairs)
    (full_x, _), (full_y, _) = scored(ours("full"), pairs)
    assert abs(x - full_x) > 1e-2
    assert abs(y - full_y) > 1e-2


@pytest.mark.parametrize("options", [{}, {"prefill_block": 30}, {"hold_back": 12}], ids=str)
@pytest.mark.parametrize("recipe", LOSSY)
def test_a_batch_changes_nothing(recipe: str, options: dict[str, int]) -> None:
    one, four = ours(recipe, 1, **options), ours(recipe, 4, **options)
    same(scored(one), scored(four))
    texts = (CONTEXT, CONTEXT[:70], "Bees.")
    assert rolled(one, *texts) == pytest.approx(rolled(four, *texts), abs=1e-3)
    assert written(one, *texts) == written(four, *texts)


def test_answers_that_do_not_fit_memory_together_are_scored_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = scored(ours("h2o@70", 4))
    monkeypatch.setattr("kvhive.engines.lm_eval.MOST_BYTES", 1)
    same(scored(ours("h2o@70", 4)), together)


def test_blocks_and_tokens_held_back_make_a_difference() -> None:
    plain, blocks, held = (
        [score for score, _ in scored(ours("h2o@70", **options))]
        for options in ({}, {"prefill_block": 30}, {"hold_back": 12})
    )
    assert plain != pytest.approx(blocks, abs=1e-3)
    assert plain != pytest.approx(held, abs=1e-3)


@pytest.mark.parametrize("recipe", LOSSY)
def test_texts_stream_through_the_cache(recipe: str) -> None:
    assert rolled(ours(recipe), CONTEXT)[0] != pytest.approx(rolled(theirs(), CONTEXT)[0], abs=0.1)


@pytest.mark.parametrize("recipe", LOSSY)
def test_texts_are_written_from_what_the_recipe_kept(recipe: str) -> None:
    model = ours(recipe)
    *ids, last = model.tok_encode(CONTEXT)
    cache = HiveCache.for_model(model.model, recipe)
    answer: list[int] = []
    with torch.no_grad():
        model.model(torch.tensor([ids]), past_key_values=cache)
        while len(answer) < 10:
            output = model.model(torch.tensor([[last]]), past_key_values=cache)
            answer.append(last := int(output.logits[0, -1].argmax()))
    assert written(model, CONTEXT, until=[]) == [model.tok_decode(answer)]


# ---- through the harness -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, and three tasks on five made-up questions."""
    folder = tmp_path_factory.mktemp("harness")
    tiny.save(folder / "model")
    lines = [
        {"context": CONTEXT, "question": f"Number {i}?", "choices": ["one", "two"], "gold": i % 2}
        for i in range(5)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(folder / "datasets")},
        "test_split": "train",
        "doc_to_text": "{{context}} {{question}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "hive_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}],
        },
        "hive_write": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
        "hive_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}} {{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, kind in kinds.items():  # JSON is YAML, too
        text = json.dumps({"task": name, **common, **kind})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def evaluate(workshop: Path, **options: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        tasks=["hive_choice", "hive_write", "hive_text"],
        task_manager=TaskManager(include_path=str(workshop), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )
    assert results is not None
    return results


def test_the_harness_runs_its_tasks(workshop: Path) -> None:
    assert get_model("kvhive") is KvhiveLM
    folder = str(workshop / "model")
    options = {"pretrained": folder, "dtype": "float32", "threads": 1}
    full = evaluate(workshop, model="kvhive", model_args=options)
    lossy = evaluate(  # a string: the harness itself would cut the recipe at its comma
        workshop,
        model="kvhive",
        model_args=f"pretrained={folder},recipe=h2o(recent=20,positions=cache)@70,dtype=float32",
        apply_chat_template=True,
    )
    plain = evaluate(workshop, model="hf", model_args=f"pretrained={folder},dtype=float32")
    for task, metric in (("hive_choice", "acc,none"), ("hive_write", "exact_match,none")):
        assert full["results"][task][metric] == plain["results"][task][metric]
    bits = [one["results"]["hive_text"]["bits_per_byte,none"] for one in (full, plain, lossy)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    assert bits[0] != pytest.approx(bits[2], abs=1e-2)
    kept = lossy["config"]["kvhive"]
    assert kept["recipe"] == "h2o(recent=20, positions=cache)@70"
    assert kept["positions"] == "cache"
    assert kept["texts"] == 5 + 5 + 5
    assert 70 == kept["tokens_kept"] < kept["tokens_read"]
    assert kept["kept_share"] == pytest.approx(70 / kept["tokens_read"], abs=1e-3)
    assert 0 < kept["bytes"] < kept["full_bytes"]
    assert full["config"]["kvhive"]["kept_share"] == 1


def test_the_command_line_runs_the_harness(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the harness sets it for good
    recipe = "buzz(stride=7,window=20)@80"
    words = ["lm-eval", "--model", "kvhive", "--tasks", "hive_choice", "--limit", "3"]
    words += ["--model_args", f"pretrained={workshop / 'model'},recipe={recipe},dtype=float32"]
    words += ["--include_path", str(workshop), "--batch_size", "4"]
    words += ["--output_path", str(tmp_path), "--log_samples"]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "hive_choice" in outcome.stdout
    (file,) = tmp_path.rglob("results_*.json")
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert Recipe.parse(config["kvhive"]["recipe"]) == Recipe.parse(recipe)
    assert config["kvhive"]["texts"] == 3
    assert config["kvhive"]["kept_share"] < 0.5
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 1


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "-M", "kvhive", "--gen_kwargs", "a=1", "b=2", "-L", "3", "--help"]
    got: list[str] = []
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("kvhive.engines.lm_eval.cli_evaluate", lambda: got.extend(sys.argv))
    assert CliRunner().invoke(app, ["lm-eval", *words]).exit_code == 0
    assert got == ["lm-eval", *words]


@pytest.mark.parametrize(
    "spelled",
    [
        "pretrained=x,recipe=buzz(stride=7,window=20)@0.4",
        '{"pretrained": "x", "recipe": "buzz(stride=7,window=20)@0.4"}',
    ],
)
def test_commas_in_recipes_reach_us(spelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model_args", spelled])
    got = HarnessCLI().parse_args().model_args
    assert got == {"pretrained": "x", "recipe": "buzz(stride=7,window=20)@0.4"}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "hto@0.4"}, "unknown policy 'hto'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"hold_back": 0}, "hold_back must be a whole number of at least 1, got 0"),
        ({"prefill_block": -3}, "prefill_block must be a whole number of at least 1, got -3"),
        ({"recipes": "full"}, "no model argument 'recipes'; did you mean: recipe"),
        ({"peft": "some/adapter"}, "no model argument 'peft'"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvhiveLM(tiny.model(), tokenizer=tiny.tokenizer(), **options)


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(TypeError, match="needs its tokenizer"):
        KvhiveLM(tiny.model())


def test_a_continuation_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="of 11 tokens is longer than the model's 8"):
        scored(ours("full", max_length=8), [("Bees", " are sleep.")])
    with pytest.raises(ValueError, match="no tokens to score"):
        scored(ours("full"), [("Bees", "")])
