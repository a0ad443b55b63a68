"""Recorded cases: a JSON file that says what happened and a safetensors file with the numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One recorded case: X.json beside X.safetensors."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The JSON: parameters, step lengths, sizes, notes."""
        facts: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return facts

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything recorded, by name; `name.NNNN` belongs to step NNNN."""
        return load_file(self.path.with_suffix(".safetensors"))

    @property
    def method(self) -> str:
        """The method that was recorded."""
        return str(self.facts.get("method", self.path.parent.name))

    @property
    def name(self) -> str:
        """`method/case`."""
        return f"{self.method}/{self.facts.get('case', self.path.stem)}"

    @property
    def params(self) -> dict[str, Any]:
        """The method's parameters."""
        params: dict[str, Any] = self.facts["params"]
        return params

    @property
    def lengths(self) -> list[int]:
        """Tokens that each step brings."""
        lengths: list[int] = self.facts["q_lens"]
        return lengths

    @property
    def is_artifact(self) -> bool:
        """Whether the recording documents a defect of the reference that must not be copied."""
        return bool(self.facts.get("reference_artifact", False))

    def at(self, step: int) -> dict[str, Any]:
        """What the JSON says of a step, empty if nothing."""
        steps: list[dict[str, Any]] = self.facts.get("steps", [])
        return steps[step] if step < len(steps) else {}

    def tensor(self, name: str, step: int) -> Tensor | None:
        """What was recorded under `name` for a step, None if nothing."""
        return self.tensors.get(f"{name}.{step:04d}")


def find_cases(folder: Path) -> list[Case]:
    """Every case below `folder`, at any depth, by path. Raises `ValueError` if there is none."""
    paths = sorted(folder.rglob("*.json"))
    cases = [Case(path) for path in paths if path.with_suffix(".safetensors").is_file()]
    if not cases:
        raise ValueError(f"no recorded cases (X.json beside X.safetensors) below {folder}")
    return cases


def labels(cases: list[Case]) -> list[str]:
    """`method/case` of each, followed by its folder where two cases share a name."""
    count = Counter(case.name for case in cases)
    return [
        case.name if count[case.name] == 1 else f"{case.name}@{case.path.parent}" for case in cases
    ]
