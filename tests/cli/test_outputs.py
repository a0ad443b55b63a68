"""Files that commands write: inputs, strangers' files and stdout."""

from __future__ import annotations

import json

import pytest

SHORT = ("--max-new-tokens", "2", "-r", "h2o@70")


@pytest.fixture
def too_late(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr(
        "kvhive.model.loading.load", lambda *words, **options: pytest.fail("too late")
    )


@pytest.mark.parametrize("command", ["compare", "show"])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_document_and_the_model_are_never_overwritten(
    run, document, folder, too_late, command, force
):
    for path in (document, folder / "config.json"):
        before = path.read_bytes()
        result = run(command, document, "--html", path, *force)
        assert result.exit_code == 2
        assert "the command reads it" in result.stderr
        assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["compare", "show"])
def test_a_stranger_s_file_needs_force(run, document, tmp_path, command):
    page = tmp_path / "thesis.html"
    page.write_text("three years")
    short = SHORT if command == "compare" else SHORT[2:]
    refused = run(command, document, "--html", page, *short)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert page.read_text() == "three years"
    assert run(command, document, "--html", page, "--force", *short).exit_code == 0
    assert "kvhive" in page.read_text()
    assert run(command, document, "--html", page, *short).exit_code == 0  # now it is ours


@pytest.mark.parametrize("command", ["compare", "show"])
def test_a_page_can_go_to_stdout_alone(run, document, command):
    short = SHORT if command == "compare" else SHORT[2:]
    result = run(command, document, "--html", "-", *short)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("<!doctype html>")
    assert result.stdout.rstrip().endswith("</html>")
    both = run(command, document, "--html", "-", "--json", *short)
    assert both.exit_code == 2
    assert "both go to stdout" in both.stderr


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("show", "-r", "h2o@70"), {"recipe", "cache_bytes", "words", "heads"}),
        (("generate", "--max-new-tokens", "3"), {"prompt", "answer", "cache_bytes"}),
    ],
)
def test_json_and_quiet(run, document, words, keys):
    command, *rest = words
    what = document if command == "show" else "Tell me of the lock."
    result = run(command, what, *rest, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert keys <= json.loads(result.stdout).keys()
    assert result.stderr == ""


def test_quiet_says_nothing_but_results_and_errors(run, document):
    result = run("compare", document, *SHORT, "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "h2o@70" in result.stdout
    assert run("compare", document, "-r", "hto@70", "-q").stderr.startswith("error: ")
    assert "note: " in run("compare", document, *SHORT).stderr  # it is not remembered


def test_methods_as_json(plain):
    every = json.loads(plain("recipes", "--json").stdout)
    assert every["policies"]["h2o"]["knobs"]["recent"]["default"] is None
    assert {"uniform"} <= every["allocations"].keys()
    one = json.loads(plain("recipes", "h2o", "--json").stdout)
    assert list(one["policies"]) == ["h2o"]
    assert "did you mean: h2o" in plain("recipes", "h2", "--json").stderr


def test_words_that_are_no_text_are_refused_before_anything_else(monkeypatch, capsys):
    from kvhive import cli

    monkeypatch.setattr("sys.argv", ["kvhive", "compare", "a\udcff.md"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "word 2 of the command is not text" in capsys.readouterr().err
