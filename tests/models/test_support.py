"""A checkpoint that chiasm cannot run correctly is refused when it is loaded, with the reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.errors import ConfigurationError, UnsupportedModelError
from chiasm.models import load_language, load_processor, load_vision
from tests.models.conftest import Loaded


def _load_language(folder: Path) -> object:
    return load_language(folder, dtype=torch.float32, device=torch.device("cpu"))


def _load_vision(folder: Path) -> object:
    return load_vision(folder, dtype=torch.float32, device=torch.device("cpu"))


LOADERS = [load_processor, _load_language, _load_vision]
WRONG: list[Any] = [None, "nonsense", [], {}, {"height": "x"}, -1, 0, 1e300]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3", "both directions"),
        ("gemma4", "both directions"),
        ("paligemma", "both directions"),
        ("deepseek_ocr2", "both directions"),
        ("qwen3_5", "linear attention"),
        ("mllama", "cross-attention"),
        ("llava_onevision", "how many images"),
        ("internvl_chat", "-HF"),
        ("kosmos-2", "chiasm supports .*qwen3_vl"),
        (None, "chiasm supports"),
    ],
)
def test_model_types_that_would_give_wrong_answers_are_refused(
    edited: Callable[..., Path], load: Callable[[Path], object], model_type: str | None, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load(edited(model_type=model_type))


def test_a_text_only_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedModelError, match="not a vision-language model"):
        load_processor(tmp_path)


def test_a_checkpoint_in_the_format_of_its_authors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_tower": "openai/clip"}))
    with pytest.raises(UnsupportedModelError, match="has no vision_config; choose"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("idefics3", "vision_config"),
        ("qwen2_vl", "vision_config"),
        ("qwen2_5_vl", "text_config"),
        ("qwen3_vl", "vision_config"),
        ("qwen3_vl_moe", "vision_config"),
    ],
)
@pytest.mark.parametrize("load", LOADERS)
def test_a_part_may_have_the_name_of_the_whole_model_as_in_published_configs(
    checkpoint: Callable[[str], Loaded],
    edited: Callable[..., Path],
    load: Callable[[Path], object],
    family: str,
    part: str,
) -> None:
    config = json.loads((checkpoint(family).folder / "config.json").read_text())
    load(edited(family, **{part: config[part] | {"model_type": family}}))


@pytest.mark.parametrize(
    ("text_config", "reason"),
    [
        ({"model_type": "gemma2"}, "soft-capped"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"model_type": "qwen3_next"}, "linear attention"),
        ({"model_type": "cohere2"}, "'cohere2' is not one of"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
            "longrope",
        ),
    ],
    ids=str,
)
def test_language_models_that_need_more_than_causal_attention_are_refused(
    checkpoint: Callable[[str], Loaded], edited: Callable[..., Path], text_config: dict[str, Any], reason: str
) -> None:
    text = json.loads((checkpoint("llava").folder / "config.json").read_text())["text_config"]
    if "model_type" in text_config:
        text = {}
    with pytest.raises(UnsupportedModelError, match=reason):
        _load_language(edited("llava", text_config={**text, **text_config}))


def test_sections_of_rotary_positions_that_do_not_make_up_a_head_are_refused(
    checkpoint: Callable[[str], Loaded], edited: Callable[..., Path]
) -> None:
    text = json.loads((checkpoint("qwen2_vl").folder / "config.json").read_text())["text_config"]
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    with pytest.raises(UnsupportedModelError, match="mrope_section"):
        _load_language(edited("qwen2_vl", text_config=text))


def test_vision_towers_of_other_families_are_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="'pixtral'"):
        load_processor(edited("llava", vision_config={"model_type": "pixtral"}))


@pytest.mark.parametrize("name", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_quantized_weights_are_refused(
    checkpoint: Callable[[str], Loaded], edited: Callable[..., Path], part: str | None, name: str
) -> None:
    values: dict[str, Any] = {name: {"quant_method": "awq", "bits": 4}}
    if part is not None:
        values = {part: json.loads((checkpoint("qwen3_vl").folder / "config.json").read_text())[part] | values}
    with pytest.raises(UnsupportedModelError, match="quantized"):
        _load_language(edited(**values))


def test_images_for_quantized_weights_have_a_size_since_vllm_runs_them(
    checkpoint: Callable[[str], Loaded], edited: Callable[..., Path]
) -> None:
    processor = load_processor(edited(quantization_config={"quant_method": "fp8"}))
    assert processor.geometry_of_size(64, 96) == checkpoint("qwen3_vl").processor.geometry_of_size(64, 96)


@pytest.mark.parametrize("load", [_load_language, _load_vision])
def test_weights_that_an_adapter_changes_are_refused(
    edited: Callable[..., Path], load: Callable[[Path], object]
) -> None:
    with pytest.raises(UnsupportedModelError, match="merge the adapter"):
        load(edited(file="adapter_config.json", peft_type="LORA"))


def test_code_that_comes_with_a_checkpoint_is_not_run(
    edited: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    folder = edited(
        file="preprocessor_config.json", image_processor_type="Own", auto_map={"AutoImageProcessor": "own.Own"}
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UnsupportedModelError, match="runs no such code"):
        load_processor(folder)
    assert not (tmp_path / "has run").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_attention_that_a_config_names_is_not_needed(
    edited: Callable[..., Path], load: Callable[[Path], object]
) -> None:
    load(edited(attn_implementation="flash_attention_2"))


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("qwen3_vl", {"do_resize": False}, "do_resize"),
        ("qwen3_vl", {"patch_size": 4}, "disagree"),
        ("qwen3_vl", {"temporal_patch_size": 1}, "disagree"),
        ("smolvlm", {"do_resize": False}, "do_resize"),
        ("smolvlm", {"max_image_size": {"longest_edge": 16}}, "disagree"),
        ("internvl", {"size": {"height": 16, "width": 16}}, "disagree"),
        ("llava", {"do_center_crop": False}, "resize images to the 32 pixels"),
        ("llava", {"crop_size": {"height": 16, "width": 16}}, "resize images to the 32 pixels"),
    ],
)
def test_preprocessing_settings_that_the_geometry_does_not_follow_are_refused(
    edited: Callable[..., Path], family: str, values: dict[str, object], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load_processor(edited(family, "preprocessor_config.json", **values))


def test_a_folder_that_is_not_a_checkpoint_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        load_processor(tmp_path)
    for damaged in (b"{", b'{"a": ' * 50_000, b'"\xff"'):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="JSON"):
            load_processor(tmp_path)


def test_a_checkpoint_without_its_tokenizer_is_a_configuration_error(edited: Callable[..., Path]) -> None:
    folder = edited()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigurationError, match="tokenizer"):
        load_processor(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_any_value_that_is_missing_or_wrong_is_told_as_one_of_the_checkpoint(
    loaded: Loaded, edited: Callable[..., Path], file: str
) -> None:
    """Each value in turn. Some aren't used, or have a default that does."""
    content = json.loads((loaded.folder / file).read_text())
    refused = 0
    for name, wrong in itertools.product(content, WRONG):
        folder = edited(loaded.family, file, **content | {name: wrong})
        try:
            load_processor(folder)
        except (ConfigurationError, UnsupportedModelError):
            refused += 1
    assert refused > len(content)
