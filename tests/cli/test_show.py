"""`kvhive show`: shaded words in the terminal and on a page."""

from __future__ import annotations

import re

import pytest
from transformers import PreTrainedTokenizerFast

from kvhive.cache.hive_cache import HiveCache
from kvhive.cli.show import shaded_text
from kvhive.comparison.shading import Word, pieces, shade
from kvhive.comparison.survivors import Survivors
from kvhive.inference.generation import read
from kvhive.inference.prompt import Prompt
from tests.cli.test_compare import Page
from tests.cli.tiny import HEADS, model, text, tokenizer


@pytest.fixture(scope="module")
def coder() -> PreTrainedTokenizerFast:
    return tokenizer()


def kept(coder: PreTrainedTokenizerFast, document: str, recipe: str) -> tuple[Prompt, Survivors]:
    prompt, network = Prompt.build(coder, document, []), model()
    cache = HiveCache.for_model(network, recipe)
    read(network, cache, prompt.prefix)
    return prompt, Survivors.of(cache)


def test_the_whole_document_is_shown_and_shaded(run, document):
    result = run("show", document, "--recipe", "h2o@90")
    assert result.exit_code == 0, result.stderr
    assert " ".join(text(110).split()) in " ".join(result.stdout.split())
    assert f"of {HEADS} heads" in result.stdout
    assert "90 kept" in result.stdout


def test_the_page_says_how_many_heads_kept_a_word(run, document, tmp_path):
    path = tmp_path / "kept.html"
    result = run("show", document, "--recipe", "h2o@90", "--html", path)
    assert result.exit_code == 0, result.stderr
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert text(110) in "".join(page.words)
    titles = re.findall(r'title="kept by (\d+) of (\d+) heads', source)
    assert len(titles) == 110
    assert {total for _, total in titles} == {str(HEADS)}
    assert len({count for count, _ in titles}) > 1
    assert 'class="a0 gone"' in source
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", source)


def test_a_word_has_the_mean_of_its_tokens(coder):
    """Every byte is a token here, so that the share can be counted by hand."""
    document = text(110)
    prompt, survivors = kept(coder, document, "h2o@90")
    words = shade(document, prompt, survivors)
    assert "".join(word.text for word in words) == document
    place, heads = prompt.head, survivors.heads.tolist()
    # The tokenizer joins nothing: bytes and tokens are in step.
    for word in words:
        size = len(word.text.encode())
        if word.share is not None:
            expected = sum(heads[place : place + size]) / size / HEADS
            assert word.share == pytest.approx(expected)
            assert word.tokens == size
        place += size


def test_everything_is_bright_when_everything_is_kept(coder):
    document = text(30)
    prompt, survivors = kept(coder, document, "full")
    shares = {word.share for word in shade(document, prompt, survivors)}
    assert shares == {1.0, None}


def test_the_text_of_all_tokens_is_the_document(coder):
    document = "naïve café 日本"
    prompt = Prompt.build(coder, document, [])
    texts = pieces(document, prompt)
    assert len(texts) == len(prompt.prefix)
    assert "".join(texts) == document


def test_the_ground_grows_brighter_with_the_share():
    words = [Word("a", share, 1) for share in (0.0, 0.1, 0.5, 1.0)]
    styles = [str(span.style) for span in shaded_text(words).spans]
    assert len(set(styles)) == 4
    grounds = [int(re.search(r"on #(..)", style).group(1), 16) for style in styles[1:]]
    assert grounds == sorted(grounds)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("streaming_llm(sink=5000)@0.4", "ask for 5,001 tokens"),
        ("h2o@5000", "its budget is not below that"),
        ("h2o@0.4", ""),
    ],
)
def test_a_budget_that_is_no_limit_is_told(run, document, recipe, why):
    result = run("show", document, "-r", recipe)
    assert result.exit_code == 0, result.stderr
    assert why in result.stderr
    assert ("kept all" in result.stderr) == bool(why)
