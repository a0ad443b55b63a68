"""What is learnt about a model, by name: everything that makes a profile is a file here."""

from kvhive.learning.base import CALIBRATIONS, Calibration, calibrate
from kvhive.learning.kept import Kept, partial_file
from kvhive.learning.picture import Picture
from kvhive.registry import import_all

__all__ = ["CALIBRATIONS", "Calibration", "Kept", "Picture", "calibrate", "partial_file"]

import_all(__name__, __path__)
