"""Compiles Triton's programs for GPUs, which takes none, and prints, as JSON, the bytes of shared
memory that each wants; run by the tests of the kernels named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvhive.kernels import (
    Ask,
    Needs,
    triton_columns,
    triton_columns_programs,
    triton_packed,
    triton_packed_programs,
    triton_programs,
    triton_ragged,
)
from kvhive.step import Step
from tests.kernels import packed_segment_cases, ragged_cases
from tests.kernels.packed_segment_cases import EXACT, Part

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
RAGGED = {
    "one query": {"widths": (128, 128), "dtype": torch.bfloat16},
    "widest": {"group": 2, "widths": (256, 256), "dtype": torch.float32, "q": 16, "padded": True},
    "odd": {"group": 11, "widths": (80, 96), "dtype": torch.float16, "q": 5, "index": torch.int32},
}
KIVI = {
    "key_parts": [(Part(4), [96]), (EXACT, [30])],
    "value_parts": [(Part(2, 32), [94]), (EXACT, [32])],
}
THREE = {"key_parts": [(Part(3, 16), [96]), (EXACT, [30])]}
EIGHT = {"key_parts": [(Part(8, 32), [40]), (EXACT, [30])]}
PACKED = {
    "one query": {**KIVI, "widths": (128, 128), "dtype": torch.bfloat16},
    "widest": {**EIGHT, "group": 2, "widths": (256, 256), "dtype": torch.float32, "q": 16},
    "odd": {**THREE, "group": 11, "widths": (80, 96), "dtype": torch.float16, "q": 5},
}
COLUMNS = {
    "prompt": {"width": 128, "dtype": torch.bfloat16, "q": 512, "group": 4},
    "widest": {"width": 256, "dtype": torch.float32, "q": 512, "group": 2},
    "odd": {"width": 80, "dtype": torch.float16, "q": 5, "group": 7, "fold": False},
}


def kind(argument: object) -> Any:
    """An argument's type, as Triton writes it."""
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    if argument is None:
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def leaves(argument: object, *place: int) -> Iterator[tuple[tuple[int, ...], object]]:
    """All that is passed, with its place, in tuples too."""
    if isinstance(argument, tuple):
        for number, part in enumerate(argument):
            yield from leaves(part, *place, number)
    else:
        yield place, argument


class Launch:
    """Compiles what would be launched."""

    def __init__(self, program: Any, capability: int, shared: list[int]) -> None:
        self.program, self.capability, self.shared = program, capability, shared

    def __getitem__(self, grid: tuple[int, ...]) -> Launch:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        """As a program is called."""
        names = self.program.arg_names
        types = dict(zip(names, map(kind, arguments), strict=False))
        types |= dict.fromkeys(constants, "constexpr")
        places = {(names.index(name),): value for name, value in constants.items()}
        passed = dict(leaves(arguments))
        absent = {place: None for place, argument in passed.items() if argument is None}
        plain = [parameter.do_not_specialize for parameter in self.program.params]
        aligned = {
            place: [["tt.divisibility", 16]]
            for place, argument in passed.items()
            if isinstance(argument, torch.Tensor)
            or (isinstance(argument, int) and argument % 16 == 0 and not plain[place[0]])
        }
        source = ASTSource(self.program, types, absent | places, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", self.capability, 32))
        assert built.asm["cubin"]
        self.shared.append(built.metadata.shared)


def launches(module: Any, capability: int, shared: list[int]) -> SimpleNamespace:
    """A module's programs, to be compiled instead of launched."""
    programs = {
        name: Launch(getattr(module, name), capability, shared)
        for name in module.__all__
        if name != "factors"
    }
    return SimpleNamespace(**programs, factors=module.factors)


def ragged(shared: list[int], capability: int, settings: dict[str, Any]) -> None:
    """The programs for ragged rows."""
    programs = launches(triton_programs, capability, shared)
    triton_ragged._programs = lambda: programs
    one = ragged_cases.case([[40, 30]], needs=Needs(columns="square", last_rows=2), **settings)
    _, lse = triton_ragged.attend(*one.tensors, one.extents, one.scale)
    triton_ragged.report(one.query, one.keys, one.extents, lse, one.scale, one.needs)


def packed(shared: list[int], capability: int, settings: dict[str, Any]) -> None:
    """The programs for rows in several forms."""
    programs = launches(triton_packed_programs, capability, shared)
    triton_packed._programs = lambda: programs
    one = packed_segment_cases.case(needs=Needs(columns="square", last_rows=2), **settings)
    _, lse = triton_packed.attend(one.query, one.segments, one.scale)
    triton_packed.report(one.query, one.segments, lse, one.scale, one.needs, one.length)


def columns(shared: list[int], capability: int, settings: dict[str, Any]) -> None:
    """The programs for column sums."""
    programs = launches(triton_columns_programs, capability, shared)
    triton_columns._programs = lambda: programs
    q, width, group = settings["q"], settings["width"], settings["group"]
    query = torch.zeros(1, q, group, width, dtype=settings["dtype"]).transpose(1, 2)
    keys = query.new_zeros(1, 1, 512, width)
    ask = Ask(Step.plain(0, q), 1.0, Needs(columns="square", fold=settings.get("fold", True)))
    triton_columns.columns(query, keys, ask)


KERNELS = {
    "ragged": (ragged, RAGGED),
    "packed": (packed, PACKED),
    "columns": (columns, COLUMNS),
}


def compiled(kernel: str, capability: int) -> dict[str, list[int]]:
    """The shared memory of each case's programs on GPUs of this capability."""
    run, cases = KERNELS[kernel]
    found: dict[str, list[int]] = {name: [] for name in cases}
    for name, settings in cases.items():
        run(found[name], capability, settings)
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1], int(sys.argv[2]))))
