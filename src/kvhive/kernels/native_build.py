"""Compiling the C kernels beside their source: at install where a compiler is, or later by
`python -m kvhive.kernels.native_build`.

Nothing but the standard library is needed; the build of the package runs this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (
    "_native.c",
    "_packed.c",
    "_packed_rows.h",
    "_packed_coding.h",
    "_columns.c",
    "_columns_tile.h",
    "_floats.h",
    "_basics.h",
)
UNITS = tuple(name for name in SOURCES if name.endswith(".c"))
LIBRARY = "_native.so"
COMPILERS = (os.environ.get("CC", ""), "cc", "gcc", "clang")  # the first that works
FLAGS = ("-O3", "-fPIC", "-shared")
THREADS = (("-fopenmp",), ())  # with OpenMP, whose threads torch has already, or on one thread


def digest(folder: Path) -> str:
    """What tells a library of these sources from one of others."""
    text = b"".join((folder / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()[:16]


def compiled(folder: Path) -> Path | None:
    """The library, compiled anew beside its sources; None where no compiler can."""
    library = folder.resolve() / LIBRARY
    fresh = library.with_suffix(f".{os.getpid()}")
    library.unlink(missing_ok=True)
    for compiler in filter(None, COMPILERS):
        for threads in THREADS:
            mark = f'-DSOURCES="{digest(folder)}"'
            words = [*shlex.split(compiler), *FLAGS, *threads, mark, "-o", str(fresh), *UNITS]
            try:
                subprocess.run(words, cwd=folder, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            fresh.replace(library)
            return library
    fresh.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    print(compiled(HERE) or "no C compiler works here: torch's own operations serve instead")
