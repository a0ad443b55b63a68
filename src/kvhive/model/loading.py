"""Load a causal language model and its tokenizer by name: the front door of models."""

from __future__ import annotations

from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvhive.files import expanded
from kvhive.model.pretrained import Loaded, from_folder, from_gguf, from_hub
from kvhive.model.smollm2 import smollm2_folder
from kvhive.model.tokenizers import remember

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32", "float64")


def load(
    name: str | Path = "smollm2",
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> Loaded:
    """A model in evaluation mode on `device`, and its tokenizer.

    `name` is "smollm2", a folder, a `.gguf` file or a hub id; `dtype` is one of `DTYPES`, or
    torch's own; `attn_implementation` None leaves the choice to transformers. "smollm2" is kept in
    bfloat16, so a wider dtype adds no precision to its weights.

    Raises ValueError for an unknown dtype or device, for damaged weights and for weights that are
    not all there, ImportError with the command to run when a package is missing, FileNotFoundError
    for a path without a model, OSError when the hub has no such model.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_device(device)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    model, tokenizer = _found(str(name), options)
    # transformers wraps `to` in a way that hides its signature from type checkers.
    cast(Any, model).to(device)
    remember(model, tokenizer)
    return model, tokenizer


def folder_or_hub(name: str | Path) -> str:
    """The folder or hub id of what `load` finds by that name, for programs that load it themselves.

    Raises ValueError for a `.gguf` file.
    """
    if str(name) == "smollm2":
        return str(smollm2_folder())
    if str(name).endswith(".gguf"):
        raise ValueError(f"{str(name)!r} is a GGUF file; give a model as a folder or by its hub id")
    path = expanded(str(name))
    return str(path) if path.is_dir() else str(name)


def be_quiet() -> None:
    """Turn off the advice and the bars of transformers, and the hub's report of every attempt."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)


def _found(name: str, options: dict[str, Any]) -> Loaded:
    if name.endswith(".gguf"):
        return from_gguf(expanded(name), options)
    place = folder_or_hub(name)
    return from_folder(Path(place), options) if Path(place).is_dir() else from_hub(place, options)


def _check_device(device: str | torch.device) -> None:
    import torch

    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers, so no model runs on it; give cpu or cuda")
