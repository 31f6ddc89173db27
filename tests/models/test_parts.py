"""Each loader loads all weights of its part of the model, and no others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from chiasm.bench import synthetic
from chiasm.bench.synthetic import SyntheticSize
from chiasm.errors import ConfigurationError, UnsupportedModelError
from chiasm.models import load_language, load_vision
from chiasm.models.base import LanguageModel, LoadProgress, VisionModel
from chiasm.models.checkpoint import Checkpoint
from chiasm.models.loading import as_stored
from tests.models.conftest import Loaded, sample_image

F32_CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}

LANGUAGE_TENSOR = "model.language_model.norm.weight"
VISION_TENSOR = "model.visual.merger.norm.weight"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_two_parts_together_are_the_whole_model(loaded: Loaded) -> None:
    vision = {name for name, _ in loaded.vision.module.named_parameters()}
    language = {name for name, _ in loaded.language.module.named_parameters()}
    whole = dict(loaded.whole.named_parameters())
    assert vision.isdisjoint(language)
    assert vision | language == whole.keys()
    assert _count(loaded.vision.module) + _count(loaded.language.module) == _count(loaded.whole)
    assert _count(loaded.language.module) == _count(loaded.whole.get_decoder()) + loaded.whole.lm_head.weight.numel()


def test_progress_counts_the_tensors_that_are_loaded(loaded: Loaded) -> None:
    progress = LoadProgress()
    load_vision(loaded.folder, **F32_CPU, progress=progress)
    vision = progress.tensors
    assert progress.loaded_tensors == vision > 0
    load_language(loaded.folder, **F32_CPU, progress=progress)
    assert progress.loaded_tensors == progress.tensors > vision


def test_no_weight_is_random_or_without_storage(loaded: Loaded) -> None:
    whole = loaded.whole.state_dict()
    for module in (loaded.vision.module, loaded.language.module):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole[name]), name


def test_tied_embeddings_stay_tied_and_are_not_in_the_vision_part(tmp_path: Path) -> None:
    folder = synthetic.make("qwen3_vl", tmp_path, size=SyntheticSize(tie_word_embeddings=True))
    language: Any = load_language(folder, **F32_CPU).module
    assert language.lm_head.weight is language.get_decoder().embed_tokens.weight
    names = {name for name, _ in load_vision(folder, **F32_CPU).module.named_parameters()}
    assert not [name for name in names if "embed_tokens" in name or "lm_head" in name]


def test_a_weight_is_found_in_the_files_in_the_dtype_that_it_has_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5000, 4).bfloat16(), torch.randn(5000, 4).bfloat16()
    save_file({"first": first}, tmp_path / "1.safetensors")
    save_file({"other": second[:, :2].contiguous(), "second": second}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"first": "1.safetensors", "other": "2.safetensors", "second": "2.safetensors"}})
    )
    checkpoint = Checkpoint(tmp_path, {}, {})
    found = as_stored(checkpoint, second.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, second)
    changed = second.float()
    changed[-1, -1] += 1
    assert as_stored(checkpoint, changed) is changed


def test_an_entry_does_not_depend_on_what_was_encoded_before(loaded: Loaded) -> None:
    first = loaded.processor.preprocess(sample_image(1))
    other = loaded.processor.preprocess(sample_image(2, 64, 64))
    entry = loaded.vision.encode(first)
    loaded.vision.encode(other)
    assert torch.equal(loaded.vision.encode(first), entry)
    assert entry.is_contiguous()
    assert entry.shape == (len(first.geometry.rows), loaded.vision.entry_width)
    assert loaded.vision.entry_width == loaded.language.entry_width


def test_an_entry_holds_the_deepstack_levels_beside_the_embedding(checkpoint: Callable[[str], Loaded]) -> None:
    loaded = checkpoint("qwen3_vl")
    assert loaded.vision.entry_width == (1 + SyntheticSize().deepstack_levels) * loaded.language.hidden_size


@pytest.fixture
def without(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> Callable[[str], Path]:
    """A Qwen3-VL checkpoint that lacks a tensor."""

    def remove(name: str) -> Path:
        folder = tmp_path / "torn"
        shutil.copytree(checkpoint("qwen3_vl").folder, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return remove


@pytest.mark.parametrize(
    ("load", "own", "other"),
    [(load_language, LANGUAGE_TENSOR, VISION_TENSOR), (load_vision, VISION_TENSOR, LANGUAGE_TENSOR)],
)
def test_a_missing_weight_is_an_error_only_for_the_part_that_needs_it(
    without: Callable[[str], Path],
    tmp_path: Path,
    load: Callable[..., LanguageModel | VisionModel],
    own: str,
    other: str,
) -> None:
    with pytest.raises(ConfigurationError, match=own.replace(".", r"\.")):
        load(without(own), **F32_CPU)
    shutil.rmtree(tmp_path / "torn")
    load(without(other), **F32_CPU)


def test_a_weight_that_belongs_to_neither_part_is_refused(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_vl").folder, tmp_path / "extra")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.sinks"):
        load_language(folder, **F32_CPU)


def test_a_weight_of_another_shape_is_a_configuration_error(
    checkpoint: Callable[[str], Loaded], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("qwen3_vl").folder, tmp_path / "reshaped")
    tensors = load_file(folder / "model.safetensors")
    tensors[LANGUAGE_TENSOR] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=re.escape(f"{LANGUAGE_TENSOR} is [7], not [64]")):
        load_language(folder, **F32_CPU)
    load_vision(folder, **F32_CPU)


@pytest.mark.parametrize("load", [load_language, load_vision])
def test_a_config_that_no_model_can_be_made_of_is_a_configuration_error(
    checkpoint: Callable[[str], Loaded], edited: Callable[..., Path], load: Callable[..., LanguageModel | VisionModel]
) -> None:
    text = json.loads((checkpoint("llava").folder / "config.json").read_text())["text_config"]
    with pytest.raises(ConfigurationError, match="Padding_idx"):
        load(edited("llava", text_config=text | {"pad_token_id": text["vocab_size"]}), **F32_CPU)


@pytest.mark.parametrize("load", [load_language, load_vision])
def test_damaged_or_absent_weights_are_a_configuration_error(
    checkpoint: Callable[[str], Loaded], tmp_path: Path, load: Callable[..., LanguageModel | VisionModel]
) -> None:
    folder = shutil.copytree(checkpoint("qwen3_vl").folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load(folder, **F32_CPU)
    weights.unlink()
    with pytest.raises(ConfigurationError, match="safetensors"):
        load(folder, **F32_CPU)
