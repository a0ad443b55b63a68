"""`kvhive doctor`: what is here, what is missing, what is broken."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kvhive import __version__
from kvhive.cli import checks
from kvhive.evaluation.data.catalogue import CATALOGUE
from kvhive.kernels import native
from tests.cli.tiny import TRAINED_LENGTH

EXTRAS = {"pdf", "smollm2", "eval", "ray", "lm-eval"}


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns, an empty cache, no data."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("KVHIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVHIVE_DATA", raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to be seen instead of the true ones; None for a package that is not there."""
    told: dict[str, str | None] = {}

    def seen(name: str) -> str:
        if (found := told.get(name, "")) is None:
            raise PackageNotFoundError(name)
        return found or version(name)

    monkeypatch.setattr(checks, "version", seen)
    return told


def report(plain, *words: str) -> tuple[dict[str, Any], int]:
    """The report as data, and the exit code."""
    result = plain("doctor", "--json", *words)
    return json.loads(result.stdout), result.exit_code


def test_nothing_is_broken_here(plain):
    result = plain("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("nothing is broken\n")
    for words in (f"kvhive          {__version__}", "transformers", "torch build", "cpu", "cache"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_report_as_json(plain):
    found, code = report(plain)
    assert code == 0
    assert found["ok"] is True
    assert set(found) == {"ok", "versions", "extras", "devices", "folders", "terminal"}
    assert set(found["extras"]) >= EXTRAS
    assert "dev" not in found["extras"]
    assert found["versions"]["kvhive"] == {"value": __version__, "ok": True, "advice": None}


@pytest.mark.parametrize("there", [True, False])
def test_c_kernels_are_no_duty(plain, monkeypatch, there):
    """How to get them is said where they are missing."""
    monkeypatch.setattr(native, "loaded", lambda: object() if there else None)
    monkeypatch.setattr(native, "lanes", lambda: 8)
    found, code = report(plain)
    assert code == 0
    told = found["devices"]["c kernels"]
    assert told["value"].startswith("compiled" if there else "not compiled")
    assert (told["advice"] is None) == there


def test_a_missing_extra_is_no_fault(plain, installed):
    installed["pypdf"] = None
    found, code = report(plain)
    assert code == 0
    expected = {"value": "missing: pypdf", "ok": True, "advice": "pip install 'kvhive[pdf]'"}
    assert found["extras"]["pdf"] == expected


@pytest.mark.parametrize(("old", "words"), [(None, "missing"), ("5.1.0", "5.1.0, but kvhive")])
def test_what_is_required_must_be_there(plain, installed, old, words):
    installed["transformers"] = old
    found, code = report(plain)
    assert code == 1
    assert found["ok"] is found["versions"]["transformers"]["ok"] is False
    assert words in found["versions"]["transformers"]["value"]
    assert found["versions"]["transformers"]["advice"].startswith("pip install 'transformers>=")
    assert plain("doctor").stdout.endswith("broken: transformers\n")


def test_a_cache_that_cannot_be_written(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVHIVE_CACHE", str(tmp_path / "file" / "cache"))
    found, code = report(plain)
    assert code == 1
    assert "cannot be written" in found["folders"]["cache"]["value"]
    assert "KVHIVE_CACHE" in found["folders"]["cache"]["advice"]


def test_data_is_counted(plain, tmp_path, monkeypatch):
    one = CATALOGUE["xsum"]
    monkeypatch.setenv("KVHIVE_DATA", str(tmp_path))
    assert "none" in report(plain)[0]["folders"]["data"]["value"]
    (tmp_path / one.file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / one.file).write_bytes(b"")
    value = report(plain)[0]["folders"]["data"]["value"]
    assert value.endswith(f"1 of {len(CATALOGUE)} sets: xsum")


def test_a_data_folder_that_is_not_there(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("KVHIVE_DATA", str(tmp_path / "nowhere"))
    found, code = report(plain)
    assert code == 1
    assert found["folders"]["data"]["ok"] is False


def test_a_model_needs_no_weights(plain, folder, tmp_path):
    """The config is all that is read."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    found, code = report(plain, "--model", str(tmp_path))
    assert code == 0
    about = {name: one["value"] for name, one in found[f"model {tmp_path}"].items()}
    assert about == {
        "family": "LlamaForCausalLM",
        "supported": "yes",
        "layers": "2 of 2 have full attention and are compressed",
        "heads": "4 of queries, 2 of keys and values",
        "trained length": f"{TRAINED_LENGTH:,} tokens",
        "positions": "original, cache",
    }


def test_layers_that_stay_as_they_are(plain, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=4, layer_types=kinds)
    config.save_pretrained(tmp_path)
    about = report(plain, "--model", str(tmp_path))[0][f"model {tmp_path}"]
    assert about["layers"]["value"].endswith("and are compressed; 2 stay as they are")


@pytest.mark.parametrize(
    ("family", "words"), [("gemma2", "caps its attention logits"), ("t5", "encoder-decoder")]
)
def test_a_model_that_is_refused(plain, tmp_path, family, words):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    result = plain("doctor", "--model", tmp_path)
    assert result.exit_code == 1
    assert words in " ".join(result.stdout.split())
    assert result.stdout.endswith("broken: supported\n")


def test_a_model_that_is_not_there(plain, tmp_path):
    result = plain("doctor", "--model", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "no model" in " ".join(result.stdout.split())
    (tmp_path / "config.json").write_text('{"model_type": "not_invented_yet"}')
    result = plain("doctor", "--model", tmp_path)
    assert result.exit_code == 1
    assert "not_invented_yet" in result.stdout
