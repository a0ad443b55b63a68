"""`--fit`, `--sweep` and `kvhive plan`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kvhive.cache.hive_cache import HiveCache
from tests.cli.conftest import Run
from tests.cli.tiny import model


def test_compare_within_a_size(run: Run, document: Path) -> None:
    ran = run("compare", document, "-r", "full", "-r", "h2o", "--fit", "60KiB", "--json")
    assert ran.exit_code == 0, ran.output
    full, h2o = json.loads(ran.stdout)
    assert h2o["recipe"].startswith("h2o@")
    assert 40 * 2**10 < h2o["cache_bytes"] <= 60 * 2**10 < full["cache_bytes"]
    assert "full does not fit 60.0 KiB" in ran.stderr
    assert f"h2o fits 60KiB as {h2o['recipe']}" in ran.stderr


@pytest.mark.parametrize("command", ["show", "generate"])
def test_show_and_generate_within_a_size(run: Run, document: Path, command: str) -> None:
    ran = run(command, document, "-r", "tova", "--fit", "20KiB")
    assert ran.exit_code == 0, ran.output
    assert "tova@" in ran.output


def test_what_cannot_fit_ends_in_a_sentence(run: Run, document: Path) -> None:
    for options, said in (
        (("-r", "h2o@9", "--fit", "1MiB"), "h2o@9 has a budget already"),
        (("-r", "h2o", "--fit", "99"), "99 bytes are too few: h2o needs at least 1 token x 2"),
        (("-r", "h2o", "--fit", "much"), "cannot read 'much'"),
        (("-r", "full", "--fit", "9KiB"), "full does not fit 9.0 KiB"),
    ):
        ran = run("show", document, *options)
        assert ran.exit_code == 2
        assert said in ran.stderr


def test_a_sweep_prints_what_it_found(run: Run, document: Path) -> None:
    words = ("compare", document, "--sweep", "h2o", "--kl", "5", "--by", "tokens")
    ran = run(*words, "--max-new-tokens", "3", "--json")
    assert ran.exit_code == 0, ran.output
    (found,) = json.loads(ran.stdout)
    assert found["recipe"] == "h2o"
    assert found["found"] in [one["recipe"] for one in found["tried"]]
    assert ran.stderr.count("tried h2o@") == len(found["tried"])
    ran = run(*words[:4], "--kl", "1e9", "--max-new-tokens", "2")
    assert "within the loss" in ran.stdout


def test_options_that_do_not_go_together(run: Run, document: Path) -> None:
    for options, said in (
        (("--sweep", "h2o"), "--sweep and --kl go together"),
        (("--kl", "0.1"), "--sweep and --kl go together"),
        (("--sweep", "h2o", "--kl", "0.1", "-r", "full"), "leave --recipe out"),
    ):
        ran = run("compare", document, *options)
        assert ran.exit_code == 2
        assert said in ran.stderr


def test_a_plan_is_of_the_model_that_would_be_loaded(run: Run) -> None:
    ran = run("plan", "--context", "1k", "--batch", "3", "-r", "h2o@100", "-r", "full", "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    parameters = list(model().parameters())
    assert told["parameters"] == sum(one.numel() for one in parameters)
    buffers = sum(one.nbytes for one in model().buffers())
    assert told["weight_bytes"] == sum(one.nbytes for one in parameters) + buffers
    assert (told["context"], told["trained_length"]) == (1024, 1024)
    h2o, full = told["recipes"]
    stock = 3 * 1024 * 2 * 2 * 2 * 8 * 4  # rows, tokens, keys and values, layers, heads, width
    assert stock < full["cache_bytes"] < 1.2 * stock
    assert h2o["cache_bytes"] < h2o["cache_bytes_while_reading"] < full["cache_bytes"]
    assert h2o["fits"] is None


def test_a_plan_within_a_memory(run: Run) -> None:
    words = ("plan", "--context", "900", "-r", "h2o@100", "-r", "full", "--memory")
    ran = run(*words, "1MiB", "--json")
    h2o, full = json.loads(ran.stdout)["recipes"]
    assert h2o["fits"]
    assert h2o["largest_batch"] > full["largest_batch"]
    assert h2o["longest_context"] == 1024
    for change, key in (("--batch", "largest_batch"), ("--context", "longest_context")):
        for more, fits in ((0, True), (1, False)):
            number = full[key] if not more else full[key] + 1
            if key == "longest_context" and number > 1024:
                continue
            again = run(*words, "1MiB", "-r", "full", change, str(number), "--json")
            assert json.loads(again.stdout)["recipes"][-1]["fits"] is fits
    table = run(*words, "1MiB").stdout
    assert "largest" in table
    assert max(map(len, table.splitlines())) <= 100
    assert "would with --batch" in run(*words, "500KiB", "--batch", "40").stderr
    assert "the weights alone take" in run(*words, "10KiB").stderr
    assert "more than the 1,024 the model was trained on" in run("plan", "--context", "2k").stderr
    assert run(*words, "1MiB", "--quiet").stderr == ""


def test_a_config_is_enough(run: Run, tmp_path: Path) -> None:
    """Llama 3.1 8B: 8.03 billion parameters, 128 KiB of keys and values a token in 16 bits."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ).save_pretrained(tmp_path)
    options = ("--context", "8k", "-r", "full", "--json", "--dtype", "bfloat16")
    ran = run("plan", *options, model=tmp_path)
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["parameters"] == 8_030_261_248
    assert told["weight_bytes"] == pytest.approx(2 * told["parameters"], rel=1e-6)
    assert told["recipes"][0]["cache_bytes"] == pytest.approx(8192 * 128 * 2**10, rel=0.03)


def test_what_cannot_be_planned_ends_in_a_sentence(run: Run, tmp_path: Path) -> None:
    for options, said in (
        (("--context", "1kb"), "expected 4096, or 32k"),
        (("--context", "1k", "--memory", "8G"), "may mean two things"),
        (("--context", "1k", "-r", "h2o"), "h2o needs a budget"),
        (("--context", "1k", "--dtype", "int3"), "dtype must be one of"),
    ):
        ran = run("plan", *options)
        assert ran.exit_code == 2
        assert said in ran.stderr
    assert "no config.json" in run("plan", "--context", "1k", model=tmp_path).stderr


def test_the_outline_of_a_config_is_that_of_the_model(folder: Path) -> None:
    from kvhive.model.config import load_config
    from kvhive.model.outline import Outline

    loaded = model()
    facts = HiveCache.for_model(loaded, "full").facts
    theirs = Outline.of(loaded, facts.rotations or ())
    ours = Outline.of_config(load_config(str(folder)), "float32")
    for name in ("shapes", "full_layers", "turned", "parameters", "weight_bytes"):
        assert getattr(ours, name) == getattr(theirs, name)
