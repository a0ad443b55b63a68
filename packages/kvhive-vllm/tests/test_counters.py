"""Numbers get from the scheduler's process to the server's."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvhive_vllm.counters import Counted

STAGES = {"waiting": 3}


def test_what_is_put_in_is_taken_out_in_another_process() -> None:
    counted, stats = Counted(2**40, 7, 30, 4), SchedulerStats(num_kv_fetch_reqs_by_stage={**STAGES})
    counted.put_into(stats)
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    got = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert Counted.taken_from(got) == counted
    assert got.num_kv_fetch_reqs_by_stage == STAGES  # as vLLM made it
    assert Counted.taken_from(got) is None
