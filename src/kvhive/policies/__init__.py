"""The policies, by name. A new one is a new file and one line here."""

from kvhive.policies import (
    buzz,
    cascading,
    corm,
    elastic,
    expected_attention,
    full,
    h2o,
    keydiff,
    kv_compress,
    l2norm,
    random,
    scissorhands,
    snapkv,
    streaming_llm,
    tova,
    window,
)
from kvhive.policies.base import POLICIES, Knob, Policy, knob

__all__ = ["POLICIES", "Knob", "Policy", "knob"]
_BUILT_IN = (
    full,
    window,
    streaming_llm,
    h2o,
    buzz,
    elastic,
    kv_compress,
    corm,
    scissorhands,
    tova,
    snapkv,
    l2norm,
    keydiff,
    expected_attention,
    random,
    cascading,
)
