"""What a shell offers after `--recipe` and `--model`, found without importing torch.

Where nothing is offered most shells complete the names of files by themselves.
"""

from __future__ import annotations

from pathlib import Path

import kvhive
from kvhive.registry import modules_in


def complete_recipe(incomplete: str) -> list[str]:
    """The policies that begin with what was typed: a policy is in the file of its name."""
    folders = [str(Path(place) / "policies") for place in kvhive.__path__]
    names = [name for name in modules_in(folders) if name != "base"]
    return [name for name in names if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """smollm2, and folders of models and .gguf files that begin with what was typed."""
    typed = Path(incomplete).expanduser()
    inside = not incomplete or incomplete.endswith("/")
    parent, begun = (typed, "") if inside else (typed.parent, typed.name)
    head = incomplete[: len(incomplete) - len(begun)]
    near = sorted(parent.iterdir()) if parent.is_dir() else []
    named = [path for path in near if path.name.startswith(begun)]
    models = [path for path in named if path.suffix == ".gguf" or (path / "config.json").is_file()]
    known = [name for name in ("smollm2",) if name.startswith(incomplete)]
    return known + [head + path.name for path in models]
