"""`kvhive compare` from the command line to the page it writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from tests.cli.tiny import TRAINED_LENGTH, save, text

RECIPES = ["-r", "full", "-r", "buzz@0.4", "-r", "h2o(recent=20)@90"]
NAMES = ["full", "buzz@0.4", "h2o(recent=20)@90"]
SHORT = ["--max-new-tokens", "4"]
VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}


class Page(HTMLParser):
    """Checks that elements close in order, and gathers text, links and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def test_the_table_has_every_recipe_and_measure(run, document):
    result = run("compare", document, "--ask", "Who keeps it?", *RECIPES, *SHORT)
    assert result.exit_code == 0, result.stderr
    for words in ("tokens", "cache", "smaller", "prefill", "decode", "KL", "top-1"):
        assert words in result.stdout
    for name in NAMES:
        assert re.search(rf"^ *{re.escape(name)}.*\d", result.stdout, re.MULTILINE)
    assert "full (reference)" in result.stdout
    assert "Who keeps it?" in result.stdout


def test_answers_stand_in_columns_where_there_is_room_and_in_lines_where_not(
    run, document, monkeypatch
):
    for columns, header in ((120, 2), (50, 1)):
        monkeypatch.setenv("COLUMNS", str(columns))
        printed = run("compare", document, "--ask", "Why?", "-r", "buzz@80", *SHORT).stdout
        answers = printed[printed.index("Why?") :].splitlines()
        found = [line for line in answers if "full" in line or "buzz@80" in line]
        assert sum("full" in line and "buzz@80" in line for line in found) == header - 1


def test_without_options_it_asks_for_a_summary_of_the_usual_recipes(run, document):
    result = run("compare", document, *SHORT)
    assert result.exit_code == 0, result.stderr
    for name in ("full", "h2o@0.4", "snapkv@0.4", "buzz@0.4"):
        assert name in result.stdout
    assert "Summarise this document" in result.stdout


def test_questions_may_be_turns(run, document, tmp_path):
    words = ["compare", document, "--ask", "A?", "--ask", "B?", "-r", "buzz@80", *SHORT]
    page = tmp_path / "turns.html"
    fresh, turns = run(*words), run(*words, "--turns", "--html", page)
    assert turns.exit_code == 0, turns.stderr
    assert "questions as turns" in " ".join(turns.stdout.split())
    assert "questions as turns" in page.read_text(encoding="utf-8")
    assert "questions as turns" not in " ".join(fresh.stdout.split())
    plain = [json.loads(run(*words, "--json", *more).stdout) for more in ([], ["--turns"])]
    first, second = ([answer["answer"] for answer in part[0]["answers"]] for part in plain)
    assert first[0] == second[0]
    assert first[1] != second[1]
    aware, fit = ["buzz@80", "--mode", "aware"], ["h2o", "--fit", "1MiB"]
    for more, told in ((aware, "leave mode"), (fit, "h2o fits 1MiB as h2o@")):
        result = run(*words[:6], "-r", *more, *SHORT, "--turns")
        assert told in " ".join(result.stderr.split())


def test_json_has_the_numbers(run, document):
    result = run("compare", document, *RECIPES, *SHORT, "--json", "--ask", "A?", "--ask", "B?")
    full, buzz, h2o = json.loads(result.stdout)
    assert [full["recipe"], buzz["recipe"], h2o["recipe"]] == NAMES
    assert full["reference"]
    assert (full["kl_nats"], full["top1_agreement"]) == (0, 1)
    assert buzz["kl_nats"] > 0
    assert h2o["tokens_kept"] == 90
    assert h2o["cache_bytes"] < full["cache_bytes"]
    assert [answer["question"] for answer in full["answers"]] == ["A?", "B?"]


def test_the_document_may_come_from_stdin(run):
    result = run("compare", "-", "-r", "window@70", *SHORT, stdin=text(60).encode())
    assert result.exit_code == 0, result.stderr
    assert "stdin" in result.stdout


def test_the_page_is_whole_and_needs_nothing_from_outside(run, document, tmp_path):
    path = tmp_path / "report.html"
    asked = ["--ask", "<b>Who</b> & why?"]
    result = run("compare", document, *asked, *RECIPES, *SHORT, "--html", path)
    assert result.exit_code == 0, result.stderr
    assert str(path) in result.stderr.replace("\n", "")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    shown = "".join(page.words)
    for name in [*NAMES, document.name, "<b>Who</b> & why?"]:
        assert name in shown
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", source)
    assert source.count('class="map"') == 2  # all but the reference
    assert "svg" in page.tags
    assert list(tmp_path.glob(".*")) == []


def test_the_page_escapes_what_the_document_says(run, tmp_path):
    """Words of the document reach the hover script; none of them may end its element."""
    document, path = tmp_path / "evil.txt", tmp_path / "page.html"
    document.write_text("</script><script>alert(1)</script> " + text(40), encoding="utf-8")
    assert run("compare", document, "-r", "window@70", *SHORT, "--html", path).exit_code == 0
    source = path.read_text(encoding="utf-8")
    Page(source)
    assert source.count("<script") == source.count("</script>") == 2


def test_a_model_without_a_chat_template_is_asked_plainly_and_says_so(run, document, tmp_path):
    plain = save(tmp_path / "plain", chat=False)
    result = run("compare", document, "-r", "window@70", *SHORT, model=plain)
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in result.stderr


def test_a_document_beyond_the_trained_length_runs_in_chunks_without_a_reference(run, tmp_path):
    document, path = tmp_path / "long.txt", tmp_path / "page.html"
    document.write_text(text(TRAINED_LENGTH // 4), encoding="utf-8")
    result = run("compare", document, "-r", "buzz(preset=paper)@200", *SHORT)
    assert result.exit_code == 2
    assert f"{TRAINED_LENGTH:,} positions" in result.stderr
    assert "--prefill-chunk" in result.stderr
    options = ["--prefill-chunk", "64", "--html", path]
    result = run("compare", document, "-r", "buzz(preset=paper)@200", *SHORT, *options)
    assert result.exit_code == 0, result.stderr
    assert "no full cache to compare with" in " ".join(result.stderr.split())
    Page(path.read_text(encoding="utf-8"))


def test_progress_in_a_pipe_is_lines(run, document):
    result = run("compare", document, "-r", "h2o@70", *SHORT)
    lines = result.stderr.splitlines()
    assert any(line.startswith("full: reading") for line in lines)
    assert "h2o@70: done" in lines
    assert "\x1b" not in result.stderr
