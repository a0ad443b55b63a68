"""What a shell offers after a tab."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from kvhive.cli import app
from kvhive.cli.completion import complete_model, complete_recipe
from kvhive.policies import POLICIES


def test_recipes_are_the_policies() -> None:
    assert complete_recipe("") == list(POLICIES)
    assert complete_recipe("sc") == ["scissorhands", "scissorhands_percentile"]
    assert complete_recipe("buzz@") == []


@pytest.mark.parametrize("command", ["compare", "show", "generate", "evaluate"])
def test_a_shell_is_answered(command, monkeypatch, capsys):
    monkeypatch.setenv("_KVHIVE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"kvhive {command} --recipe bu")
    monkeypatch.setenv("COMP_CWORD", "3")
    with pytest.raises(SystemExit):
        typer.main.get_command(app).main(prog_name="kvhive")
    assert capsys.readouterr().out.split() == ["buzz", "buzz_log"]


def test_models_are_smollm2_folders_and_gguf_files(folder, tmp_path, monkeypatch) -> None:
    for name in ("small", "large", "empty"):
        (tmp_path / name).mkdir()
    for name in ("small", "large"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "some.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert complete_model("") == ["smollm2", "large", "small", "some.gguf"]
    assert complete_model("sm") == ["smollm2", "small"]
    assert complete_model(f"{tmp_path}/l") == [f"{tmp_path}/large"]
    assert complete_model(f"{tmp_path}/") == [
        f"{tmp_path}/{name}" for name in ("large", "small", "some.gguf")
    ]
    assert complete_model("no/such/folder") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert complete_model("~/la") == ["~/large"]


def test_a_tab_loads_no_torch() -> None:
    script = (
        "import sys; from kvhive.cli import app; from kvhive.cli.completion import *; "
        "complete_recipe('b'), complete_model('s'); "
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_scripts_for_shells_can_be_shown(plain) -> None:
    result = plain("--help")
    assert "--install-completion" in result.stdout
    assert "--show-completion" in result.stdout
