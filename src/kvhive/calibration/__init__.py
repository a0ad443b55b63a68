"""What is learnt once about a model, and kept in a file: never inside a run."""

from kvhive.calibration.profile import Profile

__all__ = ["Profile"]
