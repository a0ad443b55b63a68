"""No text of a user's, a document's or a model's becomes markup."""

from __future__ import annotations

import re
from html import unescape
from importlib.resources import files

import pytest

from kvhive.templates import render
from tests.html import examples

PAYLOAD = (
    "</script></style></title><script>window.ran = 1; alert(1)</script>"
    '"\'><img src="x" onerror="window.ran = 1"><svg onload="window.ran = 1">'
    "<!--<script>{{ 7 * 7 }}{% raw %}]]> javascript:alert(1) \u2028 & &lt;"
)
PAGES = ("compare", "show", "evaluation")


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return examples.pages()


@pytest.fixture(scope="module")
def spoiled() -> dict[str, str]:
    return examples.pages(examples.spoiled(PAYLOAD))


@pytest.mark.parametrize("name", PAGES)
def test_no_text_runs_or_becomes_an_element(visit, plain, spoiled, name):
    counts, kinds = [], []
    for text in (plain[name], spoiled[name]):
        page = visit(text)
        if name == "evaluation":
            page.click("#open")
            page.click("#part-0 .opens")
            page.wait_for_selector("#items-list td")
        else:
            page.press(".map", "ArrowRight")
        assert page.evaluate("window.ran") is None
        assert page.locator("[onerror], [onload], img:not([src^='data:'])").count() == 0
        # A long name may be broken in more places, and has no room beside a point.
        counts.append(page.locator("*:not(wbr, option, svg.chart *)").count())
        kinds.append(page.evaluate("[...new Set([...document.all].map((e) => e.tagName))].sort()"))
    assert counts[0] == counts[1]
    assert set(kinds[0]) | {"path", "WBR"} == set(kinds[1]) | {"path", "WBR"}
    assert PAYLOAD.split("\u2028")[0].strip() in page.inner_text("body")
    assert PAYLOAD.split("\u2028")[0] in page.title()


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_stops_a_script_that_is_not_ours(browser, plain, tmp_path, name):
    """A second wall: even markup that got into a page would not run."""
    path = tmp_path / "page.html"
    bad = "<script>window.ran = 1</script><img src='data:,' onerror='window.ran = 1'><main>"
    path.write_text(plain[name].replace("<main>", bad), encoding="utf-8")
    page = browser.new_page()
    refusals = []
    page.on("console", lambda message: refusals.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    assert page.evaluate("window.ran") is None
    assert len(refusals) >= 2
    assert all("Content Security Policy" in told for told in refusals)
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_neither_the_network_nor_inline_attributes(plain, name):
    text = plain[name]
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'\s(style|on\w+)="', text)
    assert not re.search(r"https?:|@import|url\(", text)


def test_a_template_asks_for_nothing_it_was_not_given():
    with pytest.raises(Exception, match="'columns' is undefined"):
        render("results.html.j2")


def test_no_template_switches_escaping_off():
    for path in files("kvhive.templates").iterdir():
        if path.name.endswith(".j2"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\|\s*safe|autoescape|Markup", text), path.name


def test_what_notebooks_show_is_escaped():
    spoil = examples.spoiled(PAYLOAD)
    found = type(examples.results())(spoil(list(examples.results())))
    for shown in (found._repr_html_(), found[1].report._repr_html_()):
        assert "<script" not in shown
        assert "<img" not in shown
        assert "&lt;script&gt;window.ran" in shown
