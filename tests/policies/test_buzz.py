"""BUZZ with its own history, against an oracle and against the laws of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.policies.buzz import Buzz

from .oracles import SlowBuzz, pieces
from .rig import Rig, small_numbers

SEEDS = st.integers(0, 10**6)
SIZES = {
    "sink": st.integers(0, 4),
    "window": st.integers(1, 7),
    "threshold": st.integers(2, 15),
    "stride": st.integers(3, 7),
}
CHUNKS = st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 19, 45]), min_size=8, max_size=24)
PLAIN: dict[str, Any] = {"sink": 2, "window": 3, "threshold": 6, "stride": 3}


def budget_of(sizes: dict[str, Any]) -> int:
    """sink + window + threshold."""
    return int(sizes["sink"] + sizes["window"] + sizes["threshold"])


def fed(rig: Rig, chunks: Sequence[int]) -> Rig:
    """The rig after these steps."""
    for fresh in chunks:
        rig.step(fresh)
    return rig


# ---- the decisions ------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    chunks=CHUNKS,
    variant=st.sampled_from(["accum", "fast", "no_max"]),
    drain=st.booleans(),
    streamed=st.booleans(),
    fit=st.booleans(),
    seed=SEEDS,
)
def test_decisions_are_the_oracles(
    sizes: dict[str, Any],
    chunks: list[int],
    variant: Any,
    drain: bool,
    streamed: bool,
    fit: bool,
    seed: int,
) -> None:
    """Tokens and sample sizes after every step, for every variant and prefill."""
    received = small_numbers(seed, len(chunks), 2, sum(chunks))
    policy = Buzz(
        preset="paper",
        variant=variant,
        drain=drain,
        prefill="streamed" if streamed else "step",
        prefill_stride="fit" if fit else None,
        **sizes,
    )
    rig = Rig(policy, budget_of(sizes), received)
    flags = {"drain": drain, "streamed": streamed, "fit": fit, "judged": variant != "no_max"}
    slow = [SlowBuzz(sums=variant == "accum", **flags, **sizes) for _ in range(2)]
    for step, fresh in enumerate(chunks):
        rig.step(fresh)
        for head, oracle in enumerate(slow):
            oracle.step(fresh, rig.given(step, head))
        assert rig.positions == [oracle.held for oracle in slow]
        assert rig.slots.counters["sample"].tolist() == [[oracle.sample for oracle in slow]]


def test_the_worked_example() -> None:
    """Sinks 0 1, blocks of three, every second old entry: positions token by token."""
    rig = Rig(Buzz(preset="paper", variant="no_max", **PLAIN), 11, small_numbers(0, 33, 1, 33))
    expected = {
        10: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        11: [0, 1, 2, 5, 8, 9, 10, 11],
        15: [0, 1, 2, 8, 9, 12, 13, 14, 15],
        18: [0, 1, 2, 9, 13, 16, 17, 18],
        22: [0, 1, 2, 13, 16, 19, 20, 21, 22],
        32: [0, 1, 2, 23, 27, 30, 31, 32],
    }
    samples = {11: 3, 15: 4, 18: 3, 22: 4, 25: 3, 29: 4, 32: 3}
    for token in range(33):
        rig.step(1)
        if token in expected:
            assert rig.positions == [expected[token]]
        if token in samples:
            assert rig.slots.counters["sample"].tolist() == [[samples[token]]]


def test_the_worked_example_with_scores() -> None:
    """At token 11 the blocks 2 3 4, 5 6 7 and 8 keep their most attended tokens."""
    received = torch.zeros(12, 1, 12)
    received[11, 0, 2:9] = torch.tensor([0.9, 0.2, 0.1, 0.3, 0.8, 0.4, 0.5])
    for variant in ("accum", "fast"):
        rig = fed(Rig(Buzz(preset="paper", variant=variant, **PLAIN), 11, received), [1] * 12)
        assert rig.positions == [[0, 1, 2, 6, 8, 9, 10, 11]]


@settings(max_examples=40, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), blocks=st.integers(1, 6), seed=SEEDS)
def test_every_block_keeps_its_maximum(sizes: dict[str, Any], blocks: int, seed: int) -> None:
    """One token of each block of the first prompt, none of whose block mates has a higher score."""
    length = budget_of(sizes) + blocks * sizes["stride"]
    received = small_numbers(seed, 1, 2, length)
    rig = fed(Rig(Buzz(preset="paper", drain=False, **sizes), budget_of(sizes), received), [length])
    fresh = list(range(sizes["sink"], length - sizes["window"]))
    for head, held in enumerate(rig.positions):
        score = received[0, head]
        for block in pieces(fresh, sizes["stride"]):
            kept = [p for p in block if p in held]
            assert len(kept) == 1
            assert score[kept[0]] == score[block].max()


@settings(max_examples=40, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), seed=SEEDS, more=st.integers(1, 40))
def test_scores_of_the_old_sample_are_never_read(
    sizes: dict[str, Any], seed: int, more: int
) -> None:
    """A token is judged once: whatever its score becomes afterwards changes nothing."""
    first = budget_of(sizes) + 9
    received = small_numbers(seed, 1 + more, 2, first + more)
    calm, shaken = (
        Rig(Buzz(preset="paper", **sizes), budget_of(sizes), received) for _ in range(2)
    )
    for fresh in [first] + [1] * more:
        calm.step(fresh)
        shaken.step(fresh)
        sample = int(shaken.slots.counters["sample"][0, 0])
        judged = shaken.slots["score"][..., : sizes["sink"] + sample]
        judged.copy_(judged.flip(-1) * 17 - 5)
        assert shaken.positions == calm.positions


# ---- sizes --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), chunks=CHUNKS, seed=SEEDS)
def test_sizes_follow_the_law(sizes: dict[str, Any], chunks: list[int], seed: int) -> None:
    """By recurrence alone: when events fire, what they leave; sinks and window always kept."""
    sink, window, threshold, stride = (sizes[name] for name in SIZES)
    old_stride, sample, held = (stride + 1) // 2, 0, 0
    rig = Rig(
        Buzz(preset="paper", **sizes),
        budget_of(sizes),
        small_numbers(seed, len(chunks), 3, sum(chunks)),
    )
    for fresh in chunks:
        rig.step(fresh)
        held += fresh
        if held - sink - window > threshold:
            arrived = held - sink - window - sample
            sample = -(-sample // old_stride) + -(-arrived // stride)
            while sample > threshold:
                sample = -(-sample // old_stride)
            held = sink + sample + window
        assert held <= budget_of(sizes)
        for positions in rig.positions:
            assert len(positions) == held
            assert positions == sorted(set(positions))
            assert positions[:sink] == list(range(min(sink, rig.seen)))
            assert positions[-window:] == list(range(max(rig.seen - window, 0), rig.seen))


@pytest.mark.parametrize(
    ("stride", "sample", "between"), [(3, 161, 240), (4, 134, 267), (5, 93, 308), (7, 65, 336)]
)
def test_decoding_settles_at_the_fixed_point(stride: int, sample: int, between: int) -> None:
    """Sinks 4, window 160, threshold 400: sample, tokens between events, and the mean held."""
    rig = Rig(
        Buzz(preset="paper", variant="no_max", sink=4, window=160, threshold=400, stride=stride),
        564,
    )
    for _ in range(25):
        rig.step(565 - rig.slots.length)  # up to the token that is one too many
    smallest = rig.slots.length
    assert rig.slots.counters["sample"].tolist() == [[sample]]
    assert 565 - smallest == between
    old_stride = (stride + 1) // 2
    share = (1 / stride) / (1 - 1 / old_stride + 1 / stride)
    assert sample == pytest.approx(401 * share, abs=1)
    assert (smallest + 564) / 2 == pytest.approx(164 + 400 * (1 + share) / 2, abs=1)


@settings(max_examples=30, deadline=None)
@given(stride=st.integers(3, 8), events=st.integers(1, 9), threshold=st.integers(12, 30))
def test_an_entry_survives_as_often_as_the_old_stride_divides_its_place(
    stride: int, events: int, threshold: int
) -> None:
    """Entry 0 is permanent; entry i lives through v events when old_stride^v is the most in i."""
    policy = Buzz(
        preset="paper", variant="no_max", sink=1, window=2, threshold=threshold, stride=stride
    )
    old_stride, budget = policy.old_stride, 3 + threshold
    rig = fed(Rig(policy, budget), [budget + 1])
    first = rig.positions[0][1 : 1 + int(rig.slots.counters["sample"])]
    for count in range(1, events + 1):
        rig.step(budget + 1 - rig.slots.length)
        alive = [i for i, position in enumerate(first) if position in rig.positions[0]]
        assert alive == [i for i in range(len(first)) if i % old_stride**count == 0]


# ---- prompts ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), chunks=CHUNKS)
def test_streamed_prefill_is_decoding(sizes: dict[str, Any], chunks: list[int]) -> None:
    """Without a judge, every chunking gives what single tokens give."""
    budget = budget_of(sizes)
    single = Rig(Buzz(preset="paper", variant="no_max", **sizes), budget)
    rig = Rig(Buzz(preset="paper", variant="no_max", prefill="streamed", **sizes), budget)
    for fresh in chunks:
        fed(single, [1] * fresh)
        rig.step(fresh)
        assert rig.positions == single.positions
        assert torch.equal(rig.slots.counters["sample"], single.slots.counters["sample"])


@settings(max_examples=60, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES), prompt=st.integers(1, 400), seed=SEEDS)
def test_the_drain_does_at_once_what_the_reference_does_later(
    sizes: dict[str, Any], prompt: int, seed: int
) -> None:
    """What takes us d passes at once takes it d tokens: its sample then begins with ours."""
    received, budget = small_numbers(seed, 30, 2, prompt + 30), budget_of(sizes)
    drained = fed(Rig(Buzz(preset="paper", **sizes), budget, received), [prompt])
    late = fed(Rig(Buzz(preset="paper", drain=False, **sizes), budget, received), [prompt])
    assert drained.slots.length <= budget
    if late.slots.length <= budget:
        assert late.positions == drained.positions
    too_many = int(late.slots.counters["sample"][0, 0])
    while too_many > sizes["threshold"]:
        too_many = -(-too_many // Buzz(preset="paper", **sizes).old_stride)
        late.step(1)
    begin, size = sizes["sink"], int(drained.slots.counters["sample"][0, 0])
    assert size == too_many
    for ours, theirs in zip(drained.positions, late.positions, strict=True):
        assert ours[begin : begin + size] == theirs[begin : begin + size]


def test_a_fitted_stride_fills_the_threshold_once() -> None:
    """A prompt just over the budget keeps more; later events use the stride as it is."""
    sizes = {"sink": 4, "window": 160, "threshold": 400, "stride": 5}
    plain = fed(Rig(Buzz(preset="paper", variant="no_max", **sizes), 564), [600])
    fitted = Rig(Buzz(preset="paper", variant="no_max", prefill_stride="fit", **sizes), 564)
    assert plain.slots.length == 252
    assert fed(fitted, [600]).slots.length == 4 + 160 + 218
    fed(fitted, [1] * (565 - fitted.slots.length))
    assert fitted.slots.counters["sample"].tolist() == [[-(-218 // 3) + -(-183 // 5)]]
