"""What transformers reads from disk or a hub, whole: nothing is left at random silently.

transformers is imported inside the functions, because importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def from_folder(folder: Path, options: dict[str, Any]) -> Loaded:
    """What `save_pretrained` wrote to `folder`; the network is not asked.

    Raises `FileNotFoundError` for a folder without a model, `ValueError` for a damaged one.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {str(folder)!r}: the folder has no config.json")
    with without_bars(), naming(f"the model in {str(folder)!r}"):
        return _loaded(folder, {}, {"local_files_only": True, **options})


def from_hub(name: str, options: dict[str, Any]) -> Loaded:
    """A model of the Hugging Face hub, downloaded unless it lies in the hub's own cache.

    Raises `OSError` when there is none of that name, `ValueError` for a damaged one.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no model at {name!r}: there is no such folder")
    try:
        with naming(f"the model {name!r}"):
            return _loaded(name, {}, options)
    except OSError as error:
        raise OSError(
            f"no model {name!r}: expected 'smollm2', a folder, a .gguf file or the id of a causal "
            "language model that the Hugging Face hub, or its cache on this computer, can provide"
        ) from error


def from_gguf(file: Path, options: dict[str, Any]) -> Loaded:
    """The model in a GGUF file, unpacked to plain weights of the dtype in `options`.

    Raises `FileNotFoundError` for no file, `ImportError` that says what to install, `ValueError`
    for a damaged one.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no model at {str(file)!r}: there is no such file")
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"reading a GGUF file needs {' and '.join(missing)}: pip install 'kvhive[smollm2]'"
        )
    # The GGUF reader draws a bar of its own that no setting turns off, hence the redirection.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with without_bars(), quiet, naming(f"the model in {str(file)!r}"):
        return _loaded(file.parent, {"gguf_file": file.name}, {**options, **_plain_weights()})


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hold back the progress bars of transformers for steps that take seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _loaded(place: str | Path, both: dict[str, Any], options: dict[str, Any]) -> Loaded:
    """Model and tokenizer, checked. both: options of both; options: the model's alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    both |= {"local_files_only": True} if options.get("local_files_only") else {}
    told: Any = AutoModelForCausalLM.from_pretrained(
        place, output_loading_info=True, **both | options
    )
    model, found = told
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its weights lack {missing[0]}{more}")
    tokenizer = AutoTokenizer.from_pretrained(place, **both)
    if not tokenizer("text", add_special_tokens=False).input_ids:
        raise ValueError("its tokenizer makes no tokens of a text")
    return model, tokenizer


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Around what transformers makes of a model's files: raises `ValueError` in one sentence for
    whatever damage ends it in (KeyError, RuntimeError, ...); what is missing, of files or packages,
    passes.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        told = told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
        raise ValueError(f"{what} cannot be used: {told}; get it again, or name another") from error


def _plain_weights() -> dict[str, Any]:
    """The option that asks for unpacked weights; older releases of transformers know no other."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
