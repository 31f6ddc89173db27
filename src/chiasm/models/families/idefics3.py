"""Idefics3 and SmolVLM: an image is cut into square tiles, each of which begins with tokens that name its row and column."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from chiasm.errors import UnsupportedModelError
from chiasm.models.base import ItemGeometry
from chiasm.models.families.base import SIZE_KEY, Family, ProcessorParts

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_LARGEST_EDGE = 4096
"""The image processor scales larger images twice, which the geometry does not follow."""


class _Grid(NamedTuple):
    """Rows and columns of tiles; both are 0 if the image is a single tile."""

    rows: int
    columns: int


class Idefics3(Family):
    """The tiles come in reading order, followed by the whole image as one more tile."""

    model_types = ("idefics3", "smolvlm")
    vision_types = ("idefics3_vision", "smolvlm_vision")

    def __init__(self, parts: ProcessorParts) -> None:
        processor = parts.image_processor
        vision = parts.config.vision_config
        self._longest = int(processor.size["longest_edge"] or 0)
        self._tile = int(processor.max_image_size["longest_edge"])
        if not processor.do_resize or not 1 <= self._longest <= _LARGEST_EDGE:
            raise UnsupportedModelError(
                f"The preprocessor config must set do_resize to true, and size.longest_edge to 1 to {_LARGEST_EDGE}."
            )
        if self._tile != vision.image_size:
            raise UnsupportedModelError(
                "config.json and the preprocessor config disagree on the size of a tile. Download the checkpoint again."
            )
        self._processor = processor
        self._splits = bool(processor.do_image_splitting)
        self._tokens_per_tile = (self._tile // int(vision.patch_size) // int(parts.config.scale_factor)) ** 2
        self._tokenizer = parts.tokenizer.backend_tokenizer
        self._fake = getattr(parts.tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
        self._overview = getattr(parts.tokenizer, "global_image_token", None) or "<global-img>"
        self.placeholder_id = int(parts.config.image_token_id)
        self._placeholder: str = parts.tokenizer.convert_ids_to_tokens(self.placeholder_id)
        for token in (self._fake, self._placeholder):
            parts.token_id(token)
        self._tokens_of_grid = lru_cache(maxsize=None)(self._encode_grid)

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        token_ids, rows = self._tokens_of_grid(self._grid(height, width))
        return ItemGeometry(token_ids, rows, {SIZE_KEY: [height, width]})

    def preprocess(self, image: Image) -> dict[str, Tensor]:
        features = self._processor(images=[[image]], return_tensors="pt")
        return {name: features[name] for name in ("pixel_values", "pixel_attention_mask") if name in features}

    def _grid(self, height: int, width: int) -> _Grid:
        """Return the tiles of an image, which is scaled to the longest edge, then up to whole tiles, with separate rounding."""
        if not self._splits:
            return _Grid(0, 0)
        aspect = width / height
        if width >= height:
            width = self._longest
            height = _even(int(width / aspect))
        else:
            height = self._longest
            width = _even(int(height * aspect))
        height, width = max(height, 1), max(width, 1)

        aspect = width / height
        if width >= height:
            columns = math.ceil(width / self._tile)
            rows = math.ceil(int(columns * self._tile / aspect) / self._tile)
        else:
            rows = math.ceil(height / self._tile)
            columns = math.ceil(int(rows * self._tile * aspect) / self._tile)
        return _Grid(rows, columns) if max(rows, columns) > 1 else _Grid(0, 0)

    def _encode_grid(self, grid: _Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens for a grid of tiles, and the indices of the placeholders among them."""
        tile = self._placeholder * self._tokens_per_tile
        lines = [
            "".join(f"{self._fake}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(grid.columns)) + "\n"
            for row in range(grid.rows)
        ]
        before_overview = "\n" if lines else ""
        text = f"{''.join(lines)}{before_overview}{self._fake}{self._overview}{tile}{self._fake}"
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return token_ids, tuple(index for index, token in enumerate(token_ids) if token == self.placeholder_id)


def _even(side: int) -> int:
    return side + side % 2
