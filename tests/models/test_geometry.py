"""The geometry of an image follows from its size alone, and is the same as that of its pixels."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.bench import synthetic
from chiasm.bench.synthetic import SyntheticSize
from chiasm.errors import InvalidRequestError
from chiasm.models.base import Metadata, Pixels
from tests.models.conftest import Loaded

SIZE = SyntheticSize(max_tiles=16)
SIDES = st.integers(1, 200)


@pytest.fixture(scope="module", params=synthetic.FAMILIES)
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Checkpoints with up to 16 tiles per image."""
    return Loaded(request.param, synthetic.make(request.param, tmp_path_factory.mktemp("tiled"), size=SIZE))


def _rows(family: str, pixels: Pixels) -> int:
    """The number of rows that the vision model makes of the pixels, from their shape."""
    if "image_grid_thw" in pixels.inputs:
        return int(pixels.inputs["image_grid_thw"].prod()) // 4
    tiles = pixels.inputs["pixel_values"].shape[-4]
    patches = (SIZE.tile_pixels // SIZE.patch_pixels) ** 2
    return tiles * (patches if family == "llava" else patches // 4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=SIDES, width=SIDES)
@example(height=1, width=1)
@example(height=1, width=3)
@example(height=3, width=1)
@example(height=3, width=3)
@example(height=1, width=200)
@example(height=200, width=1)
@example(height=1000, width=7)
def test_the_geometry_of_a_size_is_that_of_the_pixels(tiled: Loaded, height: int, width: int) -> None:
    processor = tiled.processor
    pixels = processor.preprocess(Image.new("RGB", (width, height), (200, 30, 90)))
    geometry = processor.geometry_of_size(height, width)
    assert pixels.geometry == geometry
    assert len(geometry.rows) == _rows(tiled.family, pixels)
    assert len({geometry.token_ids[row] for row in geometry.rows}) == 1
    if "image_grid_thw" in pixels.inputs:
        assert pixels.inputs["image_grid_thw"].tolist() == [geometry.metadata["image_grid_thw"]]
    assert processor.geometry_of_metadata(geometry.metadata) == geometry
    assert processor.geometry_of_metadata({"image_size": [height, width]}) == geometry


def test_images_of_few_pixels_write_nothing_to_the_log(tiled: Loaded) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        for width in (1, 3):
            tiled.processor.preprocess(Image.new("RGB", (width, 5)))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not written.getvalue()


@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metadata_that_an_encoder_answers_is_accepted_for_any_size(tiled: Loaded, height: int, width: int) -> None:
    processor = tiled.processor
    try:
        geometry = processor.geometry_of_size(height, width)
    except InvalidRequestError:
        assert max(height, width) > 200 * min(height, width)
    else:
        assert processor.geometry_of_metadata(geometry.metadata) == geometry


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava"])
@pytest.mark.parametrize(("height", "width"), [(1, 201), (201, 1), (10, 5000), (1, 1 << 20)])
def test_too_elongated_images_are_refused(
    checkpoint: Callable[[str], Loaded], family: str, height: int, width: int
) -> None:
    with pytest.raises(InvalidRequestError, match="too elongated"):
        checkpoint(family).processor.geometry_of_size(height, width)


HOSTILE: list[object] = [
    {},
    None,
    [],
    "image_size",
    {"image_size": [64, 64], "image_grid_thw": [1, 8, 8]},
    {"__class__": [1, 2, 3]},
    {"image_size": None},
    {"image_size": "64"},
    {"image_size": (64, 64)},
    {"image_size": []},
    {"image_size": [64]},
    {"image_size": [64, 64, 64]},
    {"image_size": [64.0, 64]},
    {"image_size": ["64", 64]},
    {"image_size": [True, 64]},
    {"image_size": [0, 64]},
    {"image_size": [-64, 64]},
    {"image_size": [10**12, 10**12]},
    {"image_size": [10**400, 1]},
]


@pytest.mark.parametrize("metadata", HOSTILE, ids=repr)
def test_malformed_metadata_is_refused(loaded: Loaded, metadata: Metadata) -> None:
    with pytest.raises(InvalidRequestError):
        loaded.processor.geometry_of_metadata(metadata)


@pytest.mark.parametrize(
    "grid",
    [
        [1, 8],
        [1, 8, 8, 8],
        [0, 8, 8],
        [2, 8, 8],
        [True, 8, 8],
        [1, 8.0, 8],
        [1, 0, 8],
        [1, -8, -8],
        [1, 7, 8],
        [1, 8, 9],
        [1, 1000, 1000],
        [1, 2, 10**15],
        [1, 10**300, 2],
    ],
    ids=repr,
)
def test_grids_that_no_image_can_have_are_refused(checkpoint: Callable[[str], Loaded], grid: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        checkpoint("qwen3_vl").processor.geometry_of_metadata({"image_grid_thw": grid})


def test_only_the_qwen_family_accepts_grids(checkpoint: Callable[[str], Loaded]) -> None:
    with pytest.raises(InvalidRequestError, match="image_size"):
        checkpoint("smolvlm").processor.geometry_of_metadata({"image_grid_thw": [1, 8, 8]})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_every_mode_are_accepted(loaded: Loaded, mode: str) -> None:
    pixels = loaded.processor.preprocess(Image.new(mode, (20, 30)))
    assert pixels.geometry == loaded.processor.geometry_of_size(30, 20)
