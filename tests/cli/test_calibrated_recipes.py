"""Recipes that read a profile, through every command."""

from __future__ import annotations

import json

import pytest

from kvhive.calibration import Profile
from tests.cli.test_bad_input import refused
from tests.cli.tiny import text

FEW = "baklava(tokens=256, pieces=2, searched=1, scored=64, low_fracs=[0.0, 0.5], low_scales=[0.5])"


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A profile of the tiny model, made by the command."""
    from typer.testing import CliRunner

    from kvhive.cli import app

    place = tmp_path_factory.mktemp("made")
    (place / "a.txt").write_text(text(150), encoding="utf-8")
    path = place / "p.safetensors"
    words = ["calibrate", "--model", folder, "--dtype", "float32", "--for", FEW]
    words += ["--data", place / "a.txt", "-o", path]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def recipe(made):
    """That reads it."""
    return f"h2o@90/baklava(allocation=proportional, profile='{made}')"


def test_show_and_generate(run, document, recipe):
    for words in (["show", document, "-r", recipe], ["generate", text(110), "-r", recipe]):
        result = run(*words, *(["--max-new-tokens", "3"] if words[0] == "generate" else []))
        assert result.exit_code == 0, result.stderr


def test_compare_keeps_the_total(run, document, recipe):
    result = run(
        "compare", document, "-r", recipe, "-r", "h2o@90", "--max-new-tokens", "3", "--json"
    )
    assert result.exit_code == 0, result.stderr
    ours, plain = json.loads(result.stdout)[1:3]
    assert ours["recipe"] == recipe
    assert ours["tokens_kept"] == plain["tokens_kept"]


def test_sizes_in_place_of_budgets(run, document, recipe):
    free = recipe.replace("@90", "")
    result = run("show", document, "-r", free, "--fit", "100KiB", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["cache_bytes"] <= 100 * 1024
    result = run("compare", document, "-r", free, "--fit", "100KiB", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.stderr


def test_plan(run, recipe):
    result = run("plan", "--context", "500", "-r", recipe, "-r", "h2o@90", "--json")
    assert result.exit_code == 0, result.stderr
    ours, plain = json.loads(result.stdout)["recipes"]
    assert plain["cache_bytes"] <= ours["cache_bytes"] <= 1.6 * plain["cache_bytes"]


def test_evaluate(run, recipe, tmp_path):
    words = ["--data", "builtin", "-t", "passkey(lengths=[500])", "--limit", "1"]
    result = run("evaluate", "-r", recipe, *words, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("command", ["show", "compare"])
def test_profiles_that_cannot_be_used(run, document, made, tmp_path, command):
    for name, words in (("none", "no profile at"), ("damaged", "damaged"), ("cut", "damaged")):
        path = tmp_path / name
        if name != "none":
            path.write_bytes(b"hello" if name == "damaged" else made.read_bytes()[:-9])
        refused(run(command, document, "-r", f"h2o@90/baklava(profile='{path}')"), words)
    refused(
        run(command, document, "-r", f"h2o@90/zigzag(profile='{made}')"), "by 'zigzag', got one"
    )
    refused(run(command, document, "-r", "h2o@90/baklava"), "make one with kvhive calibrate")
    told = Profile.load(made)
    Profile(told.method, "0" * 64, told.data, told.date, told.tensors).save(tmp_path / "other")
    other = f"h2o@90/baklava(profile='{tmp_path / 'other'}')"
    refused(run(command, document, "-r", other), "a model with other weights")


def test_a_store_reads_a_profile_too(run, plain, document, tmp_path):
    """Searched, shown and used: half of the tiny model's layers hold nothing."""
    path, texts = tmp_path / "map.safetensors", tmp_path / "a.txt"
    texts.write_text(text(150), encoding="utf-8")
    method = "kvsharer(layers=1, pieces=2, threshold=-1.0)"
    made = run("calibrate", "--for", method, "--data", texts, "-o", path)
    assert made.exit_code == 0, made.stderr
    assert f"use it: -r \"full+kvsharer(profile='{path}')\"" in made.stdout
    shown = json.loads(plain("profile", path, "--json").stdout)
    assert shown["tables"][0]["layers"] == [[0.0], [0.0]]
    assert "the search found 1 of 1" in shown["tables"][0]["meaning"]
    recipe = f"h2o@90+kvsharer(layers=1, profile='{path}')"
    words = ["compare", document, "-r", recipe, "-r", "h2o@90", "--max-new-tokens", "3", "--json"]
    ours, whole = json.loads(run(*words).stdout)[1:3]
    assert ours["tokens_kept"] == whole["tokens_kept"]
    assert ours["cache_bytes"] < 0.6 * whole["cache_bytes"]
    assert run("show", document, "-r", recipe).exit_code == 0
    fitting = ["show", document, "-r", recipe.replace("@90", ""), "--fit", "60KiB", "--json"]
    fitted = run(*fitting)
    assert fitted.exit_code == 0, fitted.stderr
    assert json.loads(fitted.stdout)["cache_bytes"] <= 60 * 1024
    many = f"full+kvsharer(layers=2, profile='{path}')"
    refused(run("show", document, "-r", many), "layers must be at most 1")
