"""The command: what vLLM is given, and what is refused before it starts."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from typer.testing import CliRunner

from kvhive_vllm import cli, engine_args
from kvhive_vllm.recipes import SCHEDULER, WORKER


def run(*words: str) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    done = CliRunner().invoke(cli.app, list(words), terminal_width=200)
    return done.exit_code, done.output


def test_options_are_those_of_the_engine() -> None:
    code, text = run("options", "h2o@1024")
    words = shlex.split(text)
    assert code == 0
    assert words[:4] == ["--scheduler-cls", SCHEDULER, "--worker-cls", WORKER]
    assert json.loads(words[5]) == engine_args("h2o@1024")["additional_config"]
    code, text = run("options", "h2o@1024", "--json")
    assert code == 0
    assert json.loads(text) == engine_args("h2o@1024")


def test_a_recipe_that_cannot_run_ends_the_command() -> None:
    code, text = run("options", "corm@0.4")
    assert code == 2
    assert "corm lets heads hold" in text


def test_serve_passes_all_else_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(cli, "run_vllm", given.append)
    code, text = run(
        "serve", "a/model", "--recipe", "h2o@1024", "--port", "8001", "--enforce-eager"
    )
    assert (code, text) == (0, "")
    assert given[0][:5] == ["serve", "a/model", "--port", "8001", "--enforce-eager"]
    assert given[0][5:] == shlex.split(run("options", "h2o@1024")[1])


def test_an_additional_config_of_the_users_own_is_kept() -> None:
    config = json.dumps({"other": {"knob": 1}})
    for words in (["--additional-config", config], [f"--additional-config={config}"]):
        got = cli.arguments("h2o@1024", words)
        assert json.loads(got[-1]) == {"other": {"knob": 1}, "kvhive": {"recipe": "h2o@1024"}}
        assert got.count("--additional-config") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--worker-cls", "mine.Worker"], "--worker-cls is how a recipe is run"),
        (["--scheduler_cls=mine.Scheduler"], "--scheduler-cls is how a recipe is run"),
        (["--additional-config", "{"], "takes a JSON object, got '{'"),
        (["--additional-config", '{"kvhive": {"recipe": "h2o@9"}}'], "leave one out"),
    ],
)
def test_options_that_contradict_a_recipe_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(typer.BadParameter, match=why):
        cli.arguments("h2o@1024", words)


def test_versions_are_shown() -> None:
    code, text = run("version")
    assert code == 0
    assert "tested with vLLM" in text
