"""Recordings of several layers, tampered with: the replay names the event and what differs."""

from __future__ import annotations

import pytest

from .cases import Case
from .methods import REPLAYS
from .test_vectors import OWN


def tampered(name: str, tensor: str, place: tuple[int, ...], by: float) -> Case:
    """One of our cases with one number of one tensor changed."""
    case = Case(OWN / f"{name}.json")
    changed = case.tensors[tensor].clone()
    changed[place] += by
    case.tensors[tensor] = changed
    return case


@pytest.mark.parametrize(
    ("name", "tensor", "place", "by", "message"),
    [
        ("c1_paper_ratio50", "score", (1, 20), 1e-3, "step 0, layer 1: score is off"),
        ("c1_paper_ratio50", "kept", (0, 1, 9), 1, "step 0, layer 1, KV head 0: kept"),
        ("c2_paper_ratio80", "kept", (14, 0, 6), 1, "step 14, layer 0, KV head 0: kept"),
        ("c2_paper_ratio80", "k_after_prompt", (0, 1, 5, 2), 1e-4, "step 0, layer 0: k_after"),
        ("c3_paper_odd_light", "v_final", (1, 2, 3, 4), 1e-4, "step 20, layer 1: v_final"),
        ("c4_literal_reference", "kept", (10, 1, 16), 1, "step 10, layer 1, KV head 0: kept"),
        ("c4_literal_reference", "attn", (0, 0, 40, 3), 0.2, "step 0, layer 0: score is off"),
    ],
)
def test_elastic_cache_notices(
    name: str, tensor: str, place: tuple[int, ...], by: float, message: str
) -> None:
    with pytest.raises(AssertionError, match=f"^{message}"):
        REPLAYS["elastic_cache"](tampered(f"elastic_cache/{name}", tensor, place, by))


def test_the_literal_anchors_are_not_ours() -> None:
    """Taken for a recording of the corrected method, the literal one does not pass."""
    case = Case(OWN / "elastic_cache/c4_literal_reference.json")
    case.facts["params"] = case.params | {"literal": False}
    with pytest.raises(AssertionError, match=r"^step 0, layer 0, KV head 0: kept"):
        REPLAYS["elastic_cache"](case)


CONTINUAL = "l2_w8_nopool_blocks4_continual"


@pytest.mark.parametrize(
    ("name", "tensor", "place", "by", "message"),
    [
        (CONTINUAL, "prefill_metric", (1, 30, 8), 1e-5, "event 0, layer 1: prefill_metric"),
        (CONTINUAL, "evicted_blocks_requested", (3,), 1, "event 3: 6 pages asked for, recorded 7"),
        (CONTINUAL, "evicted_kv_count", (5, 0, 1), 1, "event 5, layer 0: kvs given up"),
        (CONTINUAL, "evicted_block_count", (5, 0, 1), 1, "event 5, layer 0: blocks given up"),
        (CONTINUAL, "metrics", (6, 1, 2, 59), 1e-4, "event 6, layer 1, KV head 2: metrics"),
        ("l1_w16_blocks2", "q", (0, 3, 37, 0), 0.5, "event 2, layer 0, KV head 1: metrics"),
        ("below_budget_no_eviction", "k", (0, 1, 3, 2), 0.5, "event 0, layer 0: prefill_metric"),
    ],
)
def test_kv_compress_notices(
    name: str, tensor: str, place: tuple[int, ...], by: float, message: str
) -> None:
    with pytest.raises(AssertionError, match=f"^{message}"):
        REPLAYS["kv_compress"](tampered(f"kv_compress/{name}", tensor, place, by))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CONTINUAL, {"norm": "L1"}),
        (CONTINUAL, {"protected_window_size": 9}),
        (CONTINUAL, {"max_cache_tokens": 28}),
        ("l2_full_range_buffer10_rate", {"metric_collection_buffer": 9}),
        ("l2_full_range_buffer10_rate", {"target_compression_rate": 0.3}),
        ("l2_w8_maxpool_blocks4_once", {"maxpool_kernel": 5}),
        ("l2_w8_maxpool_blocks4_once", {"observed_queries": 7}),
        ("l2_w8_maxpool_blocks4_once", {"observed_query_block": 4}),
        ("l1_w16_blocks2", {"block_size": 4}),
    ],
)
def test_kv_compress_minds_every_parameter(name: str, change: dict[str, object]) -> None:
    case = Case(OWN / f"kv_compress/{name}.json")
    case.facts["params"] = case.params | change
    with pytest.raises(AssertionError, match=r"^event \d"):
        REPLAYS["kv_compress"](case)
