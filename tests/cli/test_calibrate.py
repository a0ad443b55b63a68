"""`kvhive calibrate` and `kvhive profile`: from texts to a file, and what it says."""

from __future__ import annotations

import json
import re
import stat

import pytest
import torch

from kvhive.calibration import Profile
from kvhive.cli.profile import heat
from kvhive.learning import Picture
from kvhive.learning.zigzag import ZigZag
from tests.cli.test_bad_input import refused
from tests.cli.test_compare import Page
from tests.cli.tiny import text

FEW = "zigzag(window=8, tokens=128, pieces=3)"


@pytest.fixture
def texts(tmp_path):
    """Two texts of more than 128 bytes."""
    paths = [tmp_path / "one.txt", tmp_path / "two <b>.md"]
    for place, path in enumerate(paths):
        path.write_text(text(60 + 9 * place), encoding="utf-8")
    return paths


@pytest.fixture
def learn(run, texts, tmp_path):
    """`learn(*more)`: the tiny model, from the two texts."""

    def call(*more, method=FEW, out="p.safetensors"):
        data = [word for path in texts for word in ("--data", path)]
        return run("calibrate", "--for", method, "-o", tmp_path / out, *data, *more)

    return call


def test_what_is_learnt_can_be_used_at_once(run, plain, learn, document, tmp_path):
    result = learn()
    assert result.exit_code == 0, result.stderr
    path = tmp_path / "p.safetensors"
    assert "learnt from one.txt, two <b>.md: 3 pieces of 128 tokens" in result.stdout
    assert "100% done" in result.stderr
    used = re.search(r'use it: -r "(.*)"\n', result.stdout)[1]
    assert used == f"snapkv@0.2/zigzag(profile='{path}')"
    assert f"see it: kvhive profile {path}" in result.stdout
    kept = run("show", document, "-r", used, "--json")
    assert kept.exit_code == 0, kept.stderr
    assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, "as other files"


def test_json_tells_the_same(learn, tmp_path):
    told = json.loads(learn("--json").stdout)
    profile = Profile.load(tmp_path / "p.safetensors")
    assert told["method"] == "zigzag"
    assert told["fingerprint"] == profile.fingerprint
    assert told["data"] == profile.data
    assert told["date"] == profile.date
    assert told["seconds"] > 0


def test_without_data_made_up_prose_is_read_and_that_is_said(run, tmp_path):
    path = tmp_path / "p"
    result = run("calibrate", "--for", FEW, "-o", path)
    assert result.exit_code == 0, result.stderr
    assert "learnt from made-up books: 3 pieces" in result.stdout
    assert "note: it was learnt from made-up text; texts like yours" in result.stderr
    assert Profile.load(path).data.startswith("made-up books")


def test_a_run_that_was_stopped_goes_on(learn, tmp_path, monkeypatch):
    learn(out="whole")
    shares, count = ZigZag._shares, 0

    def stopping(self, model, ids):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return shares(self, model, ids)

    monkeypatch.setattr(ZigZag, "_shares", stopping)
    result = learn()
    assert result.exit_code == 130
    assert "note: stopped; what is done is in" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert not (tmp_path / "p.safetensors").exists()
    result = learn()
    assert result.exit_code == 0, result.stderr
    assert "note: going on where an earlier run was stopped" in result.stderr
    assert count == 4, "two pieces were done, the third was begun twice"
    ours, whole = (Profile.load(tmp_path / name) for name in ("p.safetensors", "whole"))
    assert torch.equal(ours.tensors["share"], whole.tensors["share"])
    assert not (tmp_path / "p.safetensors.partial").exists()


def test_a_stop_before_anything_was_done(learn, monkeypatch):
    def stop(self, model, ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(ZigZag, "_shares", stop)
    result = learn()
    assert result.exit_code == 130
    assert "stopped; nothing was done yet" in result.stderr


def test_what_was_begun_otherwise_is_refused(learn, tmp_path, monkeypatch):
    shares, count = ZigZag._shares, 0

    def stopping(self, model, ids):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return shares(self, model, ids)

    monkeypatch.setattr(ZigZag, "_shares", stopping)
    learn()
    result = learn(method="zigzag(window=9, tokens=128, pieces=3)")
    assert result.exit_code == 2
    assert "was begun with another model, other texts or other settings" in result.stderr


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("zigzak", "did you mean: zigzag?"),
        ("zigzag(windows=3)", "did you mean: window?"),
        ("zigzag(window=0)", "window must be at least 1"),
        ("zigzag(tau=[2.0])", "tau must be between 0.01 and 1.0"),
        ("zigzag(window=64, tokens=64)", "below the 64 tokens of a piece"),
        ("zigzag@0.4", "cannot read '@0.4'"),
    ],
)
def test_methods_that_cannot_be_learnt(learn, method, words):
    refused(learn(method=method), words)


def test_a_profile_is_not_overwritten(learn, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_text("mine")
    refused(learn(), "there is a file already", "--force")
    assert path.read_text() == "mine"
    assert learn("--force").exit_code == 0
    assert Profile.load(path).method == "zigzag"


def test_places_and_texts_that_cannot_be(run, learn, texts, tmp_path):
    refused(learn(out="none/p"), "there is no folder")
    refused(run("calibrate", "--for", FEW, "-o", "-"), "name a file with --output")
    refused(
        run("calibrate", "--for", FEW, "-o", texts[0], "--data", texts[0], "--force"),
        "the command reads it",
    )
    refused(run("calibrate", "--for", FEW, "-o", tmp_path / "p", "--data", "gone.txt"), "gone.txt")
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    result = run("calibrate", "--for", FEW, "-o", tmp_path / "p", "--data", short)
    refused(result, "no text has the 128 tokens of a piece, the longest has 11")
    assert not (tmp_path / "p").exists()


@pytest.fixture
def made(learn, tmp_path):
    """A profile."""
    assert learn().exit_code == 0
    return tmp_path / "p.safetensors"


def test_a_profile_is_shown(plain, made):
    result = plain("profile", made)
    assert result.exit_code == 0, result.stderr
    for words in ("zigzag", "one.txt", "tau 0.8", Profile.load(made).fingerprint):
        assert words in result.stdout
    share = Profile.load(made).tensors["share"].mean(-1)
    for layer in range(2):
        numbers = "  +".join(f"{value:.1%}" for value in share[:, layer].tolist())
        assert re.search(rf"^ +{layer} +{numbers}", result.stdout, re.MULTILINE)


def test_json_has_the_numbers(plain, made):
    told = json.loads(plain("profile", made, "--json").stdout)
    share = Profile.load(made).tensors["share"].double().mean(-1).T
    assert told["tables"][0]["layers"] == share.tolist()
    assert told["tables"][0]["columns"] == ["tau 0.8", "tau 0.9", "tau 0.95"]
    assert told["data"] == "one.txt, two <b>.md: 3 pieces of 128 tokens"


def test_the_page_shows_it_and_escapes(plain, made, tmp_path):
    path = tmp_path / "p.html"
    result = plain("profile", made, "--html", path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    words = " ".join(page.words)
    assert "two <b>.md" in words
    assert "two <b>.md" not in source
    value = Profile.load(made).tensors["share"].mean(-1)[1, 1]
    assert f"{float(value):.1%}" in words
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", source)


def test_what_is_no_profile_is_refused(plain, made, document, tmp_path):
    refused(plain("profile", tmp_path / "gone"), "no profile at")
    refused(plain("profile", document), "no safetensors file, or damaged")
    refused(plain("profile", made, "--html", made, "--force"), "the command reads it")
    refused(plain("profile", made, "--html", "-", "--json"), "both go to stdout")
    Profile("zigzap", "", "", "", {"a": torch.ones(1)}).save(tmp_path / "other")
    refused(plain("profile", tmp_path / "other"), "unknown calibration 'zigzap'", "zigzag")
    Profile("zigzag", "", "", "", {"a": torch.ones(1)}).save(tmp_path / "damaged")
    refused(plain("profile", tmp_path / "damaged"), "is damaged: it has no 'tau'")


def test_a_wide_picture_leaves_its_numbers_out():
    picture = Picture("all", tuple(f"head {i}" for i in range(20)), torch.rand(3, 20))
    narrow, wide = heat(picture, 80), heat(picture, 400)
    assert max(len(line) for line in narrow.plain.splitlines()) == 6 + 2 * 20
    assert not re.search(r"\.\d\d", narrow.plain)
    assert len(re.findall(r"0\.\d\d|1\.00", wide.plain)) == 60
    assert len(wide.plain.splitlines()) == 4


def test_shades_go_from_the_least_to_the_largest():
    shades = Picture("all", ("a", "b"), torch.tensor([[1.0, 5.0], [2.0, 1.5]])).shades()
    assert shades[0] == [0.0, 1.0]
    assert shades[1] == [0.5, pytest.approx(0.125**0.5)]
    assert Picture("all", ("a",), torch.ones(2, 1)).shades() == [[1.0], [1.0]]
