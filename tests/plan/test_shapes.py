"""The shapes of models agree with the models."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from chiasm.bench.synthetic import SyntheticSize, make
from chiasm.models import load_processor
from chiasm.plan.shapes import MODELS, ModelShape, cells, fixed, of_folder, tiles, well_known

SIZES = [(30, 30), (64, 128), (100, 75), (480, 640), (512, 512), (1000, 333), (77, 700)]
BILLIONS = {
    "qwen2.5-vl-3b-instruct": 3.75,
    "qwen2.5-vl-7b-instruct": 8.29,
    "qwen3-vl-2b-instruct": 2.13,
    "qwen3-vl-8b-instruct": 8.77,
    "internvl3-2b-hf": 2.09,
    "internvl3-8b-hf": 7.94,
    "llava-1.5-7b-hf": 7.06,
}
"""As the Hugging Face hub counts parameters."""


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_a_well_known_model_has_as_many_parameters_as_published(name: str, billions: float) -> None:
    shape = MODELS[name]
    found = shape.language.parameters + shape.vision.parameters
    assert found / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b-instruct", "Qwen2.5-VL-7B"])
def test_a_model_is_known_with_and_without_its_owner(name: str) -> None:
    assert well_known(name) is MODELS["qwen2.5-vl-7b-instruct"]


def test_other_models_are_not_known() -> None:
    assert well_known("demo") is None


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl", "llava"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family = str(request.param)
    return family, make(family, tmp_path_factory.mktemp("shapes") / family)


def test_tokens_of_images_are_those_of_the_processor(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    size, processor = SyntheticSize(), load_processor(folder)
    cell = 2 * size.patch_pixels
    per_tile = (size.tile_pixels // cell) ** 2
    rule = {
        "qwen2_5_vl": cells(cell, cell**2, size.max_pixels),
        "qwen3_vl": cells(cell, cell**2, size.max_pixels),
        "internvl": tiles(size.tile_pixels, per_tile, size.max_tiles),
        "llava": fixed(len(processor.geometry_of_size(32, 32).token_ids)),
    }[family]
    for height, width in SIZES:
        assert rule(height, width) == len(processor.geometry_of_size(height, width).token_ids), (height, width)


def test_a_folder_has_the_shape_of_its_weights(checkpoint: tuple[str, Path]) -> None:
    _, folder = checkpoint
    shape = of_folder(folder, "made", bytes_per_value=4)
    language = vision = 0
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            rows = 1
            for side in tensor.get_shape():
                rows *= side
            if any(part in name for part in ("visual", "vision", "projector")):
                vision += rows
            else:
                language += rows
    assert shape.language.parameters == pytest.approx(language, rel=0.02)
    # Embeddings of patches and positions take part in small models.
    assert shape.vision.parameters == pytest.approx(vision, rel=0.45)
    assert shape.tokens_of(64, 64) == len(load_processor(folder).geometry_of_size(64, 64).token_ids)


def test_windows_make_attention_linear_in_the_size_of_the_image() -> None:
    def growth(shape: ModelShape) -> float:
        return shape.vision.flops(16_000) / shape.vision.flops(4000)

    windowed, whole = MODELS["qwen2.5-vl-7b-instruct"], MODELS["qwen3-vl-8b-instruct"]
    assert 4 < growth(windowed) < growth(whole) < 16
