"""The replays can fail: a recording that was tampered with is noticed, at the right step."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from .cases import Case, find_cases, labels
from .methods import REPLAYS
from .test_vectors import OWN
from .test_vectors import test_replay as replay_case


def tampered(name: str, tensor: str) -> Case:
    """One of our cases with one number of one tensor changed."""
    case = Case(OWN / f"{name}.json")
    changed = case.tensors[tensor].clone()
    changed.view(-1)[-1] += 1
    case.tensors[tensor] = changed
    return case


@pytest.mark.parametrize(
    ("name", "tensor", "step"),
    [
        ("buzz/accum_gqa", "kept.0050", 50),
        ("buzz/accum_gqa", "score.0117", 117),
        ("buzz/fast_mha", "kept.0100", 100),
        ("buzz/nomax_decode", "kept.0000", 0),
        ("buzz/streamed_prefill_nomax", "kept.0020", 20),
        ("buzz/drain_large_prefill_accum", "kept.0000", 0),
        ("buzz/nomax_large_prefill_artifact", "kept.0003", 3),
        ("buzz/fast_fold_artifact", "kept.0010", 10),
        ("buzz/e2e_position_shift", "out.0030", 30),
        ("buzz/e2e_position_shift", "kept.0007", 7),
        ("h2o/decode_gqa", "kept.0060", 60),
        ("h2o/chunked", "score.0006", 6),
        ("cascading_kv/c1_stream_four_levels", "positions", 71),
        ("cascading_kv/c2_strided_prefill_then_decode", "scores", 16),
        ("cascading_kv/c3_single_level_is_sliding_window", "rope_positions", 11),
        ("cascading_kv/c4_short_and_default_decay", "out", 7),
        ("corm/capped", "mask.0030", 30),
        ("corm/decode_gqa_union", "mask.0070", 70),
        ("less/c3_decode_h2o", "H", 12),
        ("less/c3_decode_h2o", "z", 12),
        ("less/c3_decode_h2o", "out", 12),
        ("less/c3_decode_h2o", "interaction_k", 0),
        ("less/c4_decode_prompt_below_budget", "scalingD", 6),
        ("scissorhands/paper_chunked", "kept.0007", 7),
        ("scissorhands/released_prefill", "attn", 0),
        ("scissorhands/released_prefill_batch", "out", 0),
        ("streaming_llm/decode", "kept.0033", 33),
        ("streaming_llm/chat_make_room", "space.0004", 4),
        ("streaming_llm/chat_make_room", "kept.0009", 9),
        ("streaming_llm/e2e_position_shift_gqa", "out.0015", 15),
        ("tova/decode_gqa", "kept.0024", 24),
        ("tova/decode_mha", "kept.0005", 5),
        ("tova/prefill_batch", "kept", 0),
        ("snapkv/snapkv_avgpool_w8", "kept_sorted", 0),
        ("snapkv/snapkv_maxpool_w16_odd", "kept_sorted_low_tie", 0),
        ("snapkv/snapkv_gqa_max", "scores", 0),
        ("snapkv/snapkv_press_gqa", "kept_sorted_low_tie", 0),
        ("l2norm/knorm_press", "kept_sorted_cr0.5", 0),
        ("l2norm/kvcf_fixed_capacity", "kept_sorted", 0),
        ("l2norm/l2compress_half_skip01", "kept_count", 0),
        ("l2norm/l2compress_stream", "kept_sorted_per_step", 63),
    ],
)
def test_a_changed_number_is_noticed(name: str, tensor: str, step: int) -> None:
    """The failure names the step."""
    case = tampered(name, tensor)
    with pytest.raises(AssertionError, match=rf"^step {step}\b"):
        REPLAYS[case.method](case)


@pytest.mark.parametrize(
    ("name", "fact", "step"),
    [
        ("buzz/accum_mha", "sample_size", 0),
        ("buzz/accum_mha", "after", 40),
        ("buzz/fast_fold_artifact", "sample_size", 9),
        ("h2o/decode_mha", "before", 17),
        ("streaming_llm/local_window", "after", 5),
        ("streaming_llm/chat_make_room", "before", 8),
    ],
)
def test_a_changed_size_is_noticed(name: str, fact: str, step: int) -> None:
    """Sizes in the JSON are compared too."""
    case = Case(OWN / f"{name}.json")
    case.facts["steps"] = copy.deepcopy(case.facts["steps"])
    case.facts["steps"][step][fact] += 1
    with pytest.raises(AssertionError, match=rf"^step {step}\b"):
        REPLAYS[case.method](case)


def test_attention_itself_is_checked() -> None:
    """Logits that differ from those recorded change scores and choices."""
    case = Case(OWN / "h2o/decode_mha.json")
    case.tensors["logits"] = case.tensors["logits"].roll(1, dims=0)
    with pytest.raises(AssertionError, match=r"^step 0\b"):
        REPLAYS["h2o"](case)


def test_the_wrong_fold_is_not_reproduced() -> None:
    """Folding as it should be done, our choices differ from those of the defect."""
    case = Case(OWN / "buzz/fast_fold_artifact.json")
    case.facts["reference_artifact"] = False
    with pytest.raises(AssertionError, match=r"^step 0, KV head \d: kept"):
        REPLAYS["buzz"](case)


def test_a_window_of_zero_is_refused() -> None:
    """The reference stops evicting then; we refuse, and say so when such a recording comes up."""
    case = Case(OWN / "buzz/nomax_large_prefill_artifact.json")
    case.facts["params"] = case.params | {"window": 0}
    REPLAYS["buzz"](case)


def test_cases_are_found_at_any_depth(tmp_path: Path) -> None:
    """Pairs count, stray JSON files do not, and equal names stay apart."""
    for folder in ("one", "two/deep/er"):
        (tmp_path / folder).mkdir(parents=True)
        for suffix in ("json", "safetensors"):
            shutil.copy(OWN / f"h2o/chunked.{suffix}", tmp_path / folder / f"case.{suffix}")
    (tmp_path / "one" / "notes.json").write_text("{}")
    found = labels(find_cases(tmp_path))
    assert [label.split("@")[0] for label in found] == ["h2o/chunked", "h2o/chunked"]
    assert len(set(found)) == 2
    with pytest.raises(ValueError, match="no recorded cases"):
        find_cases(tmp_path / "nowhere")


def test_a_method_without_replay_is_skipped(tmp_path: Path) -> None:
    """With the reason, so that a report tells it from a pass."""
    (tmp_path / "case.json").write_text(json.dumps({"method": "nonesuch", "case": "one"}))
    with pytest.raises(pytest.skip.Exception, match="unsupported: nonesuch"):
        replay_case(Case(tmp_path / "case.json"))


def test_every_own_vector_has_a_replay() -> None:
    """What lies in tests/vectors is not there to be skipped."""
    assert {case.method for case in find_cases(OWN)} <= set(REPLAYS)


def test_players_see_every_query_head() -> None:
    """A case with groups brings as many query heads as it says."""
    for case in find_cases(OWN):
        if {"kv_heads", "group"} <= case.facts.keys() and "logits" in case.tensors:
            facts = case.facts
            size = (facts["kv_heads"] * facts["group"], facts["n"], facts["n"])
            assert case.tensors["logits"].shape == torch.Size(size)
