"""kvhive: small KV caches for large language models.

Public names load on first use, so that `import kvhive` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvhive.budget import Budget
    from kvhive.cache.hive_cache import HiveCache
    from kvhive.cache.report import Report
    from kvhive.calibration import Profile
    from kvhive.inference.conversation import Conversation
    from kvhive.inference.reading import Reading, read
    from kvhive.model.loading import load
    from kvhive.policies import POLICIES, Policy
    from kvhive.recipe import Recipe

_HOME = {
    "Budget": "budget",
    "Conversation": "inference.conversation",
    "HiveCache": "cache.hive_cache",
    "POLICIES": "policies",
    "Policy": "policies",
    "Profile": "calibration",
    "Reading": "inference.reading",
    "Recipe": "recipe",
    "Report": "cache.report",
    "load": "model.loading",
    "read": "inference.reading",
}
__all__ = [
    "POLICIES",
    "Budget",
    "Conversation",
    "HiveCache",
    "Policy",
    "Profile",
    "Reading",
    "Recipe",
    "Report",
    "load",
    "read",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvhive' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvhive.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
