"""Profiles that come with the package: `profiles/METHOD-MODEL.safetensors`, beside this module."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

from kvhive.calibration.profile import Profile


@cache
def shipped(method: str) -> tuple[Profile, ...]:
    """Those made by `method`, one a model."""
    folder = files("kvhive.calibration") / "profiles"
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.startswith(f"{method}-") and file.name.endswith(".safetensors"):
            with as_file(file) as path:
                found.append(Profile.load(path))
    return tuple(found)
