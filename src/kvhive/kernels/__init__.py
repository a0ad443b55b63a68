"""Attention that also reports what it saw. `attend` is the one entry; see `contracts` for the
terms.
"""

from kvhive.kernels.chunked import attend, span
from kvhive.kernels.contracts import NOTHING, Needs, Observed

__all__ = ["NOTHING", "Needs", "Observed", "attend", "span"]
