"""Numbers that the scheduler counts and the server shows, although they are two processes.

They travel with vLLM's own statistics, in the one part of these that holds numbers by name
(`num_kv_fetch_reqs_by_stage`), and are taken out before anything else looks at it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "kvhive_"


@dataclass(frozen=True)
class Counted:
    """Tokens dropped and blocks freed since they were last told; blocks held now, by so many
    requests.
    """

    dropped: int
    freed: int
    blocks: int
    requests: int

    def put_into(self, stats: SchedulerStats) -> None:
        """Send it with these."""
        own = {PREFIX + name: value for name, value in asdict(self).items()}
        stats.num_kv_fetch_reqs_by_stage |= own

    @classmethod
    def taken_from(cls, stats: SchedulerStats) -> Counted | None:
        """What came with these, which hold it no longer; None: nothing came."""
        held = stats.num_kv_fetch_reqs_by_stage
        names = [PREFIX + field.name for field in fields(cls)]
        return cls(*(held.pop(name) for name in names)) if names[0] in held else None
