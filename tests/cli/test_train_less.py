"""`kvhive train-less`: from texts to kernels, and to a recipe that uses them."""

from __future__ import annotations

import json
import re

import pytest

from kvhive.calibration import Profile
from tests.cli.test_bad_input import refused
from tests.cli.tiny import text

SMALL = ("--tokens", "600", "--pieces", "2", "--epochs", "2", "--hidden", "4")


@pytest.fixture
def train(run, tmp_path):
    """`train(*more)`: the tiny model, from one text."""
    (tmp_path / "a.txt").write_text(text(400), encoding="utf-8")

    def call(*more, out="p.safetensors"):
        data = ("--data", tmp_path / "a.txt", "-o", tmp_path / out)
        return run("train-less", *data, *SMALL, *more)

    return call


def test_kernels_are_trained_shown_and_used(run, plain, train, document, tmp_path):
    result = train("--rank", "4")
    assert result.exit_code == 0, result.stderr
    assert "100% done" in result.stderr
    path = tmp_path / "p.safetensors"
    used = re.search(r'use it: -r "(.*)"\n', result.stdout)[1]
    assert used == f"h2o@0.1+less(profile='{path}')"
    shown = json.loads(plain("profile", path, "--json").stdout)
    assert "error of a layer's attention" in shown["tables"][0]["meaning"]
    assert len(shown["tables"][0]["layers"]) == 2
    page = tmp_path / "p.html"
    assert plain("profile", path, "--html", page).exit_code == 0
    assert "epoch 1" in page.read_text(encoding="utf-8")
    recipe = used.replace("less(", "less(rank=4, ")
    told = run("compare", document, "-r", recipe, "--max-new-tokens", "3", "--json")
    assert told.exit_code == 0, told.stderr
    refused(run("show", document, "-r", used), "rank must be that of its kernels, 4, got 8")


def test_it_is_a_calibration_by_another_name(run, train, tmp_path):
    assert train().exit_code == 0
    settings = "less(tokens=600, pieces=2, epochs=2, hidden=4)"
    data = ("--data", tmp_path / "a.txt", "-o", tmp_path / "q")
    assert run("calibrate", "--for", settings, *data).exit_code == 0
    ours, theirs = (Profile.load(tmp_path / name) for name in ("p.safetensors", "q"))
    assert ours.data == theirs.data
    assert all(ours.tensors[name].equal(theirs.tensors[name]) for name in theirs.tensors)


def test_bad_settings_are_refused(train, tmp_path):
    refused(train("--rank", "0"), "less: rank must be at least 1, got 0")
    assert train().exit_code == 0
    refused(train(), "there is a file already")
