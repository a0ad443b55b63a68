"""Attention that also reports what it saw: `attend`, and `report` for one more policy on the same
prompt; see `contracts` for the terms.
"""

from kvhive.kernels.chunked import attend, report, span
from kvhive.kernels.contracts import NOTHING, Needs, Observed

__all__ = ["NOTHING", "Needs", "Observed", "attend", "report", "span"]
