"""Compiles Triton's programs for GPUs, which takes none, and prints, as JSON, the bytes of shared
memory that each wants; run by `test_triton_ragged.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvhive.kernels import Needs, triton_programs, triton_ragged
from tests.kernels.ragged_cases import case

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
CASES = {
    "one query": {"widths": (128, 128), "dtype": torch.bfloat16},
    "widest": {"group": 2, "widths": (256, 256), "dtype": torch.float32, "q": 16, "padded": True},
    "odd": {"group": 11, "widths": (80, 96), "dtype": torch.float16, "q": 5, "index": torch.int32},
}


def kind(argument: object) -> str:
    """An argument's type, as Triton writes it."""
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


class Launch:
    """Compiles what would be launched."""

    def __init__(self, program: Any, capability: int, shared: list[int]) -> None:
        self.program, self.capability, self.shared = program, capability, shared

    def __getitem__(self, grid: tuple[int, ...]) -> Launch:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        """As a program is called."""
        names = self.program.arg_names
        given = dict(zip(names, arguments, strict=False))
        constants |= {name: None for name, argument in given.items() if argument is None}
        types = {name: "constexpr" if name in constants else kind(given[name]) for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.program, types, places)
        built = triton.compile(source, target=GPUTarget("cuda", self.capability, 32))
        assert built.asm["cubin"]
        self.shared.append(built.metadata.shared)


def compiled(capability: int) -> dict[str, list[int]]:
    """The shared memory of each case's programs on GPUs of this capability."""
    found: dict[str, list[int]] = {}
    for name, settings in CASES.items():
        shared = found.setdefault(name, [])
        launches = {
            program: Launch(getattr(triton_programs, program), capability, shared)
            for program in ("attend", "merge", "report")
        }
        programs = SimpleNamespace(**launches, factors=triton_programs.factors)
        triton_ragged._programs = lambda programs=programs: programs
        one = case([[40, 30]], needs=Needs(columns="square", last_rows=2), **settings)
        _, lse = triton_ragged.attend(*one.tensors, one.extents, one.scale)
        triton_ragged.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
