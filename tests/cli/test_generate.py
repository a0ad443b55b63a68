"""`kvhive generate`: the text on stdout, what the cache holds on stderr."""

from __future__ import annotations

import re

import torch
from transformers.cache_utils import DynamicCache

from kvhive.model.chat import chat_ids
from tests.cli.tiny import TRAINED_LENGTH, model, save, text, tokenizer


def test_it_writes_what_the_model_itself_would_write(run):
    result = run("generate", text(40), "-r", "full", "--max-new-tokens", "12")
    assert result.exit_code == 0, result.stderr
    coder, stock = tokenizer(), model()
    ids = torch.tensor([chat_ids(coder, text(40))])
    cache = DynamicCache()
    new = stock.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    expected = coder.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.stdout == expected + "\n"
    assert "tokens seen" in result.stderr


def test_the_prompt_may_come_from_stdin_and_the_cache_stays_within_budget(run):
    options = ["-r", "window@70", "--max-new-tokens", "5", "--prefill-chunk", "32"]
    result = run("generate", "-", *options, stdin=text(60).encode())
    assert result.exit_code == 0, result.stderr
    kept = re.search(r"([\d,]+) tokens seen, (\d+) kept", result.stderr)
    assert int(kept[1]) == len(chat_ids(tokenizer(), text(60))) + 4
    assert 65 < int(kept[2]) <= 70


def test_a_seed_repeats_what_was_drawn(run):
    drawn = ["generate", "hello", "-r", "full", "--temperature", "1.5", "--max-new-tokens", "20"]
    first, again = (run(*drawn, "--seed", "7").stdout for _ in range(2))
    assert first == again
    assert first != run(*drawn, "--seed", "8").stdout


def test_a_model_without_a_chat_template_continues_the_text(run, tmp_path):
    plain = save(tmp_path / "plain", chat=False)
    result = run("generate", "hello", "-r", "full", "--max-new-tokens", "3", model=plain)
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in result.stderr


def test_beyond_the_trained_length_it_says_what_to_do(run):
    result = run("generate", text(TRAINED_LENGTH // 4), "-r", "h2o@100")
    assert result.exit_code == 2
    assert "h2o(positions=cache)" in result.stderr.replace("\n", "")


def test_it_says_so_when_nothing_had_to_go_and_refuses_what_it_would_ignore(run):
    result = run("generate", "hello", "-r", "h2o@400", "--max-new-tokens", "3")
    assert "nothing to evict" in " ".join(result.stderr.split())
    for wrong, words in (
        (["--top-p", "0.9"], "give a temperature"),
        (["--temperature", "1", "--top-p", "1.5"], "top_p must be"),
        (["--temperature", "1", "--top-k", "0"], "top_k must be"),
    ):
        result = run("generate", "hello", "-r", "full", *wrong)
        assert result.exit_code == 2
        assert words in result.stderr.replace("\n", " ")


def test_drawing_among_one_token_is_greedy(run):
    greedy = run("generate", "hello", "-r", "full", "--max-new-tokens", "9").stdout
    for narrow in (["--top-k", "1"], ["--top-p", "0.000001"]):
        options = ["--temperature", "1.5", *narrow, "--max-new-tokens", "9"]
        assert run("generate", "hello", "-r", "full", *options).stdout == greedy
