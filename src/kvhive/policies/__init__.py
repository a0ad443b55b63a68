"""The policies, by name, and what one is written with. A new policy is a new file here."""

from kvhive.kernels import Held, Needs, Observed
from kvhive.policies._parts.selection import keep_top, recent, sinks
from kvhive.policies._parts.sizing import Sizing
from kvhive.policies.base import POLICIES, Choice, Policy, Positions, Reconstruction
from kvhive.registry import import_all
from kvhive.slots import Column, Slots
from kvhive.spec import knob

__all__ = [
    "POLICIES",
    "Choice",
    "Column",
    "Held",
    "Needs",
    "Observed",
    "Policy",
    "Positions",
    "Reconstruction",
    "Sizing",
    "Slots",
    "keep_top",
    "knob",
    "recent",
    "sinks",
]

import_all(__name__, __path__)
