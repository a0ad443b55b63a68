"""Attention that also reports: `attend`, and `report` for one more policy on the same step; `peaks`
for the most that any query gives a slot. `contracts` has the terms, `reference` what they mean.
"""

from kvhive.kernels.contracts import NOTHING, TOGETHER, Ask, Held, Needs, Observed, Rows, Viewed
from kvhive.kernels.dispatch import attend, report
from kvhive.kernels.peaks import peaks

__all__ = [
    "NOTHING",
    "TOGETHER",
    "Ask",
    "Held",
    "Needs",
    "Observed",
    "Rows",
    "Viewed",
    "attend",
    "peaks",
    "report",
]
