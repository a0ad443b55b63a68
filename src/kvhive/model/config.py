"""The config of a model by name, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from kvhive.files import expanded
from kvhive.model.pretrained import naming
from kvhive.model.smollm2 import smollm2_folder


def load_config(name: str | Path) -> PretrainedConfig:
    """The config of the model that `kvhive.load(name)` loads.

    Raises ImportError with the command to run when a package is missing, FileNotFoundError for a
    path without a model, OSError when the hub has no such model, ValueError for a kind of model
    that transformers does not know.
    """
    path, options = expanded(str(name)), dict[str, Any]()
    if name == "smollm2":
        path = smollm2_folder()
    elif path.suffix == ".gguf":
        path, options = path.parent, {"gguf_file": path.name}
    local = path.is_dir()
    if local and not options and not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model in {str(path)!r}: the folder has no config.json")
    try:
        place = path if local else name
        with naming(f"the config of {str(name)!r}"):
            config: PretrainedConfig = AutoConfig.from_pretrained(
                place, local_files_only=local, **options
            )
    except OSError as error:
        raise OSError(
            f"no model {str(name)!r}: expected 'smollm2', a folder, a .gguf file or the id of a "
            "causal language model that the Hugging Face hub, or its cache on this computer, can "
            "provide"
        ) from error
    return config
