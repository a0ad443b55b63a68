"""A step of the build: the C kernels are compiled beside their source, where a compiler is."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "src/kvhive/kernels"


class CompiledKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the library into the wheel, which is then of one platform; without one it is of any."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, that of an editable install too."""
        folder = Path(self.root, KERNELS)
        library = runpy.run_path(str(folder / "native_build.py"))["compiled"](folder)
        if library is None:
            self.app.display_warning("no C compiler works here: torch's own operations will serve")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"{KERNELS}/{library.name}")
