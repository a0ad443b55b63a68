"""The policies, by name. A new one is a new file and one line here."""

from kvhive.policies import (
    buzz,
    buzz_log,
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
    scissorhands_percentile,
    snapkv,
    streaming_llm,
    tova,
    window,
)
from kvhive.policies.base import POLICIES, Choice, Policy

__all__ = ["POLICIES", "Choice", "Policy"]
_BUILT_IN = (
    full,
    window,
    streaming_llm,
    h2o,
    buzz,
    buzz_log,
    elastic,
    kv_compress,
    corm,
    scissorhands,
    scissorhands_percentile,
    tova,
    snapkv,
    l2norm,
    keydiff,
    expected_attention,
    random,
    cascading,
)
