"""The policies, by name. A new one is a new file and one line here."""

from kvhive.policies import buzz, full, h2o, streaming_llm, window
from kvhive.policies.base import POLICIES, Knob, Policy, knob

__all__ = ["POLICIES", "Knob", "Policy", "knob"]
_BUILT_IN = (full, window, streaming_llm, h2o, buzz)
