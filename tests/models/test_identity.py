"""A fingerprint changes with everything that changes an embedding, and nothing else; a model's name leads to its folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chiasm.errors import ConfigurationError
from chiasm.models import fingerprint, load_vision, resolve_folder
from tests.models.conftest import Loaded


@pytest.fixture
def folder(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("qwen3_vl").folder, tmp_path / "copy")


def test_a_copy_has_the_same_fingerprint(checkpoint: Callable[[str], Loaded], folder: Path) -> None:
    original = fingerprint(checkpoint("qwen3_vl").folder, "bfloat16")
    assert fingerprint(folder, "bfloat16") == original
    assert len(original) == 64
    assert set(original) <= set("0123456789abcdef")


def test_another_dtype_gives_another_fingerprint(folder: Path) -> None:
    assert fingerprint(folder, "bfloat16") != fingerprint(folder, "float32")


@pytest.mark.parametrize(
    "name",
    ["model.visual.merger.norm.bias", "model.visual.pos_embed.weight", "model.language_model.embed_tokens.weight"],
)
def test_other_weights_give_another_fingerprint(folder: Path, name: str) -> None:
    before = fingerprint(folder, "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder, "bfloat16") != before


def test_an_index_of_other_files_does_not_count_beside_a_single_file(folder: Path) -> None:
    before = fingerprint(folder, "bfloat16")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "earlier.safetensors"}}')
    assert fingerprint(folder, "bfloat16") == before
    load_vision(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_other_settings_give_another_fingerprint(folder: Path, file: str) -> None:
    before = fingerprint(folder, "bfloat16")
    with (folder / file).open("a") as stream:
        stream.write(" \n")
    assert fingerprint(folder, "bfloat16") != before


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_files_that_concern_only_text_do_not_change_the_fingerprint(folder: Path, file: str) -> None:
    before = fingerprint(folder, "bfloat16")
    (folder / file).write_text("{}")
    assert fingerprint(folder, "bfloat16") == before


@pytest.mark.parametrize("size", [0, 5, 200])
def test_damaged_weights_are_a_configuration_error(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ConfigurationError, match="damaged"):
        fingerprint(folder, "bfloat16")


def test_a_fingerprint_does_not_load_torch(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from chiasm.models import fingerprint; import chiasm.models.base;"
        "print(fingerprint(Path(sys.argv[1]), 'bfloat16'), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert output.stdout.split() == [fingerprint(folder, "bfloat16"), "False", "False"]


def test_the_path_of_a_checkpoint_folder_names_a_model(folder: Path) -> None:
    assert resolve_folder(str(folder)) == folder


@pytest.mark.parametrize("model", ["", "no-such-model", "./missing/folder", "/missing/folder/", "a/b/c", "~/../x y/z"])
def test_a_name_of_no_model_is_a_configuration_error(model: str) -> None:
    with pytest.raises(ConfigurationError, match="There is no model"):
        resolve_folder(model)


def test_a_hub_model_that_cannot_be_downloaded_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="give the path of its folder"):
        resolve_folder("nobody/nothing")
