"""What people run vLLM with: chunked prompts, short pools, prefixes, aborts, samples, log-probs."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests.models import Tiny, free_blocks, generated, greedy, prompts, scheduler_of

VOTING = ("h2o@80", "snapkv@80", "buzz@0.4", "cascading@80", "tova@80", "expected_attention@80")


@pytest.mark.parametrize("recipe", VOTING)
def test_chunked_prompts_are_compressed_as_one(tiny: Tiny, recipe: str) -> None:
    """Steps of 64 tokens, shared with decoding; the last chunk is shorter than any window."""
    texts, new = prompts(200, 131, 323), 40
    with tiny.engine(recipe, max_num_batched_tokens=64, enable_chunked_prefill=True) as llm:
        given = generated(llm, texts, greedy(new))
    assert given == [tiny.expected(recipe, text, new) for text in texts]


def test_a_budget_out_of_reach_is_stock_vllm(tiny: Tiny) -> None:
    texts = prompts(90, 140)
    with tiny.engine(None) as llm:
        stock = generated(llm, texts, greedy(30))
    with tiny.engine("h2o@1000") as llm:
        assert generated(llm, texts, greedy(30)) == stock


def test_a_short_pool_holds_more_requests(tiny: Tiny) -> None:
    """Blocks for about three of eight prompts: nobody is preempted, nothing is lost."""
    texts, new = prompts(*[250] * 8), 40
    with tiny.engine("snapkv@80", num_gpu_blocks_override=30, max_model_len=320) as llm:
        given = generated(llm, texts, greedy(new))
        free, total = free_blocks(llm)
    assert given == [tiny.expected("snapkv@80", text, new) for text in texts]
    assert free == total


def test_a_request_that_is_preempted_after_an_eviction_comes_back(tiny: Tiny) -> None:
    """Two that grow push out the one that came last; all end with all their tokens."""
    texts, new, recipe = prompts(30, 31, 200), 80, "h2o@120"
    options = {"num_gpu_blocks_override": 10, "max_model_len": 288, "disable_log_stats": False}
    with tiny.engine(recipe, **options) as llm:
        given = generated(llm, texts, greedy(new))
        preempted = _preemptions(llm)
        free, total = free_blocks(llm)
    assert preempted > 0
    assert given[:2] == [tiny.expected(recipe, text, new) for text in texts[:2]]
    assert len(given[2]) == new
    assert free == total


def test_one_preempted_before_its_first_eviction_is_as_if_it_had_not_been(tiny: Tiny) -> None:
    texts, new = prompts(64, 64, 64), 60
    recipe = "h2o@120"
    with tiny.engine(
        recipe, num_gpu_blocks_override=9, max_model_len=192, disable_log_stats=False
    ) as llm:
        given = generated(llm, texts, greedy(new))
        preempted = _preemptions(llm)
    assert preempted > 0
    assert given == [tiny.expected(recipe, text, new) for text in texts]


@pytest.mark.parametrize("recipe", ["streaming_llm@80", "keydiff@80", "snapkv@80", "h2o@80"])
def test_prefixes_are_shared_and_never_altered(tiny: Tiny, recipe: str) -> None:
    """The same prompts again and again, in one engine: hits give what was computed at first."""
    head, tails = prompts(192, seed=5)[0], prompts(40, 70, 100, seed=6)
    texts, new = [head + tail for tail in tails], 30
    wanted = [tiny.expected(recipe, text, new) for text in texts]
    with tiny.engine(recipe, enable_prefix_caching=True, disable_log_stats=False) as llm:
        for _ in range(3):
            assert generated(llm, texts, greedy(new)) == wanted
        hits = _hits(llm)
        free, total = free_blocks(llm)
    assert free == total
    assert (hits > 0) == (recipe != "h2o@80")


def test_hit_rates_are_those_of_stock_vllm(tiny: Tiny) -> None:
    head, tails = prompts(192, seed=5)[0], prompts(40, 70, 100, seed=6)
    texts, rates = [head + tail for tail in tails], []
    for recipe in (None, "keydiff@80"):
        with tiny.engine(recipe, enable_prefix_caching=True, disable_log_stats=False) as llm:
            for _ in range(3):
                generated(llm, texts, greedy(20))
            rates.append(_hits(llm))
    assert rates[0] == rates[1] > 0


def test_shared_prefixes_in_a_pool_that_is_too_short(tiny: Tiny) -> None:
    """Everything is shared and nothing free: requests wait for each other, and end."""
    head = prompts(224, seed=7)[0]
    texts, new = [head + tail for tail in prompts(8, 9, 10, 11, seed=8)], 40
    options = {"enable_prefix_caching": True, "num_gpu_blocks_override": 12, "max_model_len": 320}
    with tiny.engine("window@200", **options) as llm:
        given = generated(llm, texts, greedy(new))
        free, total = free_blocks(llm)
    assert [len(one) for one in given] == [new] * 4
    assert free == total


def test_an_abort_in_mid_stream_gives_all_blocks_back(tiny: Tiny) -> None:
    with tiny.engine("h2o@80") as llm:
        engine = llm.llm_engine
        for place, text in enumerate(prompts(150, 160, 170)):
            engine.add_request(str(place), {"prompt_token_ids": text}, greedy(50))
        for _ in range(5):
            engine.step()
        engine.abort_request(["1"])
        ended = set()
        while engine.has_unfinished_requests():
            ended |= {one.request_id for one in engine.step() if one.finished}
        free, total = free_blocks(llm)
    assert ended == {"0", "2"}
    assert free == total


def test_a_prompt_that_streams_in_is_aborted(tiny: Tiny) -> None:
    with tiny.engine("h2o@80") as llm:
        engine = llm.llm_engine
        request = engine.input_processor.process_inputs(
            "a", {"prompt_token_ids": prompts(90)[0]}, greedy(5), ("generate",), resumable=True
        )
        engine.engine_core.add_request(request)
        assert not scheduler_of(llm).has_unfinished_requests()
        free, total = free_blocks(llm)
    assert free == total


def test_stop_strings_and_tokens_end_a_text_where_vllm_ends_it(tiny: Tiny) -> None:
    text = prompts(180)[0]
    whole = tiny.expected("h2o@80", text, 40)
    word = f"w{whole[20]}"
    place = whole.index(whole[20])
    with tiny.engine("h2o@80", skip_tokenizer_init=False) as llm:
        for given in ({"stop": [word]}, {"stop_token_ids": [whole[20]]}):
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **given)
            said = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)[0]
            one = said.outputs[0]
            assert one.finish_reason == "stop"
            assert word not in one.text.split()
            assert list(one.token_ids) == whole[: place + 1]


def test_compiled_models_give_the_same(tiny: Tiny) -> None:
    """Attention is called between compiled pieces."""
    texts, new = prompts(150, 97), 30
    with tiny.engine("h2o@80", enforce_eager=False) as llm:
        given = generated(llm, texts, greedy(new))
    assert given == [tiny.expected("h2o@80", text, new) for text in texts]


def test_samples_seeds_and_log_probabilities(tiny: Tiny) -> None:
    text = prompts(180)[0]
    params = SamplingParams(
        n=3, temperature=1.0, seed=7, max_tokens=20, logprobs=2, detokenize=False
    )
    with tiny.engine("h2o@80") as llm:
        one, two = (_samples(llm, text, params) for _ in range(2))
        many = generated(llm, [text], greedy(20))[0]
    assert one == two
    assert len({tuple(tokens) for tokens, _ in one}) == 3
    assert all(count == 20 for _, count in one)
    assert many == tiny.expected("h2o@80", text, 20)


def test_log_probabilities_of_the_prompt_are_those_of_the_full_cache(tiny: Tiny) -> None:
    text = prompts(180)[0]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    said = []
    for recipe in (None, "h2o@80"):
        with tiny.engine(recipe, enable_prefix_caching=True) as llm:
            generated(llm, [text], greedy(5))
            given = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)[0]
            said.append(
                [
                    {t: round(p.logprob, 4) for t, p in (at or {}).items()}
                    for at in given.prompt_logprobs
                ]
            )
    assert said[0] == said[1]


def _samples(llm: Any, text: list[int], params: SamplingParams) -> list[tuple[list[int], int]]:
    given = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)[0]
    return [(list(one.token_ids), len(one.logprobs)) for one in given.outputs]


def _hits(llm: Any) -> int:
    """Tokens found in the prefix cache since the start."""
    return _metric(llm, "vllm:prefix_cache_hits")


def _preemptions(llm: Any) -> int:
    return _metric(llm, "vllm:num_preemptions")


def _metric(llm: Any, name: str) -> int:
    return int({metric.name: metric for metric in llm.get_metrics()}[name].value)
