"""The reconstruction pass against transformers' own attention; it leaves nothing behind."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import kvhive
from kvhive.budget import Budget
from kvhive.cache import reconstruction
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.reconstruction import Words, passages
from kvhive.comparison.compare import compare
from kvhive.evaluation.scoring import ModelRunner
from kvhive.kernels import Observed
from kvhive.policies import Reconstruction, Slots
from kvhive.policies.h2o import H2O
from kvhive.recipe import Recipe
from tests.cli import tiny as bytewise
from tests.support import kept_sets, left_padded, random_ids, tiny, tiny_llama

LENGTHS, CHUNK, SINK = (100, 73, 30), 40, 4
WHOLE = 100_000  # a budget that evicts nothing
HYBRID: dict[str, object] = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Quiet(H2O):
    """Asks for the pass and learns nothing from it."""

    @property
    def reconstruction(self) -> Reconstruction:
        return Reconstruction(CHUNK)


@dataclass(frozen=True)
class Noting(H2O):
    """Raises when a pass reaches it."""

    @property
    def reconstruction(self) -> Reconstruction:
        return Reconstruction(CHUNK)

    def observe_reconstruction(self, slots: Slots, seen: Observed, repeated: Tensor) -> None:
        raise ArithmeticError("observed")


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """Float64, so that both sides agree to the last digits."""
    return tiny_llama(dtype=torch.float64)


@torch.no_grad()
def slow_scores(
    stock: PreTrainedModel, seen: list[int], given: list[int], words: Words | None
) -> list[Tensor]:
    """`[K, tokens given]` of each layer, from the attention that transformers reports of passes
    over `given`, which came after `seen`, restricted to what KVzip has the softmax run over.
    """
    whole, scores = seen + given, []
    for start in range(0, len(given), CHUNK):
        piece = given[start : start + CHUNK]
        asked: list[int] = []
        if words is not None and start:
            asked = [*words.part, *given[start - 8 : start], *words.close]
        elif words is not None:
            asked = [*words.whole, *words.close]
        fed = torch.tensor([[*whole, *asked, *piece]])
        attention = stock(fed, output_attentions=True).attentions
        first = len(seen) + start
        among = [*range(min(SINK, first)), *range(first, first + len(piece))]
        among += range(len(whole), fed.shape[1])
        skip = min(SINK, first)
        layers = []
        for layer in attention:
            part = layer[0][:, len(whole) :][..., among]
            part = (part / part.sum(-1, keepdim=True)).amax(1)
            layers.append(part.unflatten(0, (2, -1)).amax(1)[:, skip : skip + len(piece)])
        scores.append(layers)
    return [torch.cat(list(parts), 1) for parts in zip(*scores, strict=True)]


@pytest.mark.parametrize("policy", [f"kvzip(chunk={CHUNK})", f"hive(chunk={CHUNK})"])
@pytest.mark.parametrize("spoken", [False, True])
def test_scores_are_those_of_transformers(
    wide: LlamaForCausalLM, policy: str, spoken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows, groups of heads, chunks with a rest; and a second turn, which leaves the scores
    of the first as they were.
    """
    words = Words((7, 8, 9), (10, 11), (12,)) if spoken else None
    monkeypatch.setattr(Words, "of", lambda model: words)
    stock = tiny_llama(dtype=torch.float64)
    stock.set_attn_implementation("eager")
    first = [random_ids(length, seed=length) for length in LENGTHS]
    later = [random_ids(length, seed=7 * length) for length in (9, 55, 41)]
    cache = HiveCache.for_model(wide, f"{policy}@{WHOLE}")
    ids, mask = left_padded(first)
    cache.read(ids, mask)
    more, also = left_padded(later)
    before = [layer.slots["repeated"].clone() for layer in cache.hive_layers()]
    cache.read(more, torch.cat([mask, also], 1))
    for row, (one, two) in enumerate(zip(first, later, strict=True)):
        old = slow_scores(stock, [], one.tolist(), words)
        new = slow_scores(stock, one.tolist(), two.tolist(), words)
        for place, layer in enumerate(cache.hive_layers()):
            read_first = before[place][row, :, -len(one) :].double()
            assert torch.allclose(read_first, old[place], rtol=1e-3, atol=1e-6)
            held = layer.slots["repeated"][row][:, layer.slots.valid[row, 0]].double()
            assert torch.allclose(
                held, torch.cat([old[place], new[place]], 1), rtol=1e-3, atol=1e-6
            )


def test_a_row_without_padding_is_as_in_a_padded_batch(wide: LlamaForCausalLM) -> None:
    first = [random_ids(length, seed=length) for length in LENGTHS]
    batch = HiveCache.for_model(wide, f"hive(chunk={CHUNK})@50")
    batch.read(*left_padded(first))
    for row, one in enumerate(first):
        alone = HiveCache.for_model(wide, f"hive(chunk={CHUNK})@50")
        alone.read(one[None])
        assert kept_sets(batch, row) == kept_sets(alone)


@pytest.mark.parametrize("budget", [24, WHOLE])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_leaves_no_trace(family: str, budget: int, positions: Any, rows: int) -> None:
    """Turns, padding and decoding: what is held, its bytes and all logits are as without it."""
    model = tiny(family, **(HYBRID if family == "gemma3_text" else {}))
    made = [
        HiveCache.for_model(model, Recipe(policy, Budget(tokens=budget), positions=positions))
        for policy in (H2O(), Quiet())
    ]
    masks: list[Tensor] = []
    for turn in range(3):
        texts = [random_ids(95 - 30 * row, seed=9 * turn + row) for row in range(rows)]
        ids, mask = left_padded(texts)
        masks.append(mask)
        logits = [cache.read(ids, torch.cat(masks, 1)) for cache in made]
        assert torch.equal(*logits)
        for _ in range(3):
            masks.append(torch.ones(rows, 1, dtype=torch.int64))
            token = logits[0].argmax(-1, keepdim=True)
            logits = [cache.read(token, torch.cat(masks, 1)) for cache in made]
            assert torch.equal(*logits)
        for row in range(rows):
            assert kept_sets(made[0], row) == kept_sets(made[1], row)
        assert made[0].report().nbytes == made[1].report().nbytes
        assert made[0].get_seq_length() == made[1].get_seq_length()
    for ours, theirs in zip(*(cache.hive_layers() for cache in made), strict=True):
        assert torch.equal(ours.slots["score"], theirs.slots["score"])
        assert ours.appended == theirs.appended


def test_no_more_than_a_step_and_its_pass_is_held(model: PreTrainedModel) -> None:
    """In chunks the prompt is repeated and evicted from chunk by chunk."""
    cache, most = HiveCache.for_model(model, "hive(window=8, chunk=32)@40"), []
    ids = random_ids(1, 300)
    watch = cache.hive_layers()[-1]

    class Watching(list[int]):
        def __call__(self, share: float) -> None:
            self.append(watch.slots.length)

    seen = Watching()
    kvhive.cache.reading.prefill(model, cache, ids, 50, tick=seen)
    most = [length for length in seen]
    assert len(most) == 6
    assert max(most) <= 2 * 40
    alone = HiveCache.for_model(model, "hive(window=8, chunk=32)@40")
    for start in range(0, 300, 50):
        alone.read(ids[:, start : start + 50])
    assert kept_sets(cache) == kept_sets(alone)


def test_a_pass_that_does_not_fit_is_refused_before_anything_is_read() -> None:
    model = tiny("llama", max_position_embeddings=200)
    cache = HiveCache.for_model(model, "hive(chunk=64)@60")
    cache.read(random_ids(1, 90))
    before = kept_sets(cache)
    said = (
        r"hive\(chunk=64\)@60: reading and repeating 60 tokens, 64 at a time, leads to position 210"
    )
    with pytest.raises(ValueError, match=said):
        cache.read(random_ids(1, 60))
    with pytest.raises(ValueError, match=r"trained on 200"):
        cache.read(random_ids(1, 80), prefill_chunk=40)
    assert kept_sets(cache) == before
    assert cache.get_seq_length() == 90
    cache.read(random_ids(1, 50))
    assert cache.get_seq_length() == 140


def test_what_is_not_repeated(model: PreTrainedModel) -> None:
    """Single tokens, a frozen cache, drafts, and what no policy asks for."""
    ids = random_ids(1, 60)
    cache = HiveCache.for_model(model, Recipe(Noting(), Budget(tokens=30)))
    with cache.freeze():
        cache.read(ids)
    cache.read(ids[:, :1])
    drafting = HiveCache.for_model(model, cache.recipe)
    drafting.hive_layers()[0].activate_past_recording()
    drafting.read(ids)
    HiveCache.for_model(model, "hive(reconstruct=false)@40").read(ids)
    with pytest.raises(ArithmeticError):
        cache.read(ids)


def test_a_failure_inside_the_pass_leaves_nothing_switched(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, Recipe(Noting(), Budget(tokens=30)))
    with pytest.raises(ArithmeticError):
        cache.read(random_ids(1, 60))
    progress = cache.progress
    assert (progress.frozen, progress.reading, progress.repeats) == (0, False, None)
    cache.reset()
    with cache.freeze():
        cache.read(random_ids(1, 60))


def test_generate_goes_without_and_says_so_once(model: PreTrainedModel) -> None:
    ids, options = random_ids(1, 60), {"max_new_tokens": 3, "do_sample": False}
    cache = HiveCache.for_model(model, "hive@50")
    with pytest.warns(UserWarning, match=r"hive goes without its reconstruction pass"):
        out = model.generate(ids, past_key_values=cache, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(torch.cat([out, ids], 1), past_key_values=cache, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = HiveCache.for_model(model, "hive@50")
        read.read(ids[:, :-1])
        model.generate(ids, past_key_values=read, **options)
        alone = HiveCache.for_model(model, "hive(reconstruct=false)@50")
        model.generate(ids, past_key_values=alone, **options)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the passages fed from now on: the tokens of each."""
    fed: list[int] = []
    feed = reconstruction._repeat

    def counted(*args: Any) -> None:
        fed.append(args[2].ids.shape[1])
        feed(*args)

    monkeypatch.setattr(reconstruction, "_repeat", counted)
    return fed


def test_every_way_to_read_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokenizer = bytewise.model(), bytewise.tokenizer()
    document = bytewise.text(60)
    fed = passes(monkeypatch)
    recipe = "hive(window=8)@80"
    reading = kvhive.read(network, tokenizer, document, recipe)
    assert len(fed) == 1
    assert fed[0] > len(document) + 40  # the words that ask for it, in the model's chat form
    reading.ask("Who?", max_new_tokens=2)
    assert len(fed) == 2
    del fed[:]
    compare(network, tokenizer, document, ["Who?"], ["h2o@80", recipe], max_new_tokens=2)
    assert len(fed) == 2
    del fed[:]
    recipes = [Recipe.parse(one) for one in ("full", recipe, "h2o@80")]
    ids = tokenizer(document).input_ids
    whole = ModelRunner(network).read(ids, recipes)[1]
    assert len(fed) == 1
    in_blocks = ModelRunner(network, block=100).read(ids, recipes)[1]
    assert len(fed) == 1 + -(-len(ids) // 100)
    for sequence, block in ((whole, None), (in_blocks, 100)):
        alone = HiveCache.for_model(network, recipe)
        alone.read(torch.tensor([ids]), prefill_chunk=block)
        assert kept_sets(sequence.cache) == kept_sets(alone)


def test_the_words_are_the_models_own(model: PreTrainedModel) -> None:
    """A tokenizer that was given is remembered; a model that nobody knows one of goes without."""
    assert Words.of(tiny("llama")) is None
    network, tokenizer = bytewise.model(), bytewise.tokenizer()
    cache = HiveCache.for_model(network, "kvzip@80")
    cache.read(torch.tensor([tokenizer("Something to be read.").input_ids]), tokenizer=tokenizer)
    words = Words.of(network)
    assert words is not None
    assert tokenizer.decode(words.whole) == "\n\nRepeat the previous context exactly."
    assert tokenizer.decode(words.close) == "<|end|>\n<|start|>assistant\n"
    plain = bytewise.tokenizer(chat=False)
    cache.reset()
    cache.read(torch.tensor([plain("Something to be read.").input_ids]), tokenizer=plain)
    words = Words.of(network)
    assert words is not None
    assert plain.decode(words.close) == "\n"


def test_passages_of_uneven_rows() -> None:
    words = Words((90,), (91, 92), (93,))
    made = passages([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], 2, words)
    ids = [
        [one for one, real in zip(row, own, strict=True) if real]
        for row, own in zip(made[1].ids.tolist(), made[1].real.tolist(), strict=True)
    ]
    assert ids == [[91, 92, 1, 2, 93, 3, 4], [], [91, 92, 8, 9, 93, 10]]
    assert [one.ids.shape[1] for one in made] == [4, 7, 8]
    assert made[1].repeats.tolist() == [[3, 1], [0, 0], [1, 0]]
    assert passages([[1, 2, 3]], 2, None)[1].ids.tolist() == [[3]]
