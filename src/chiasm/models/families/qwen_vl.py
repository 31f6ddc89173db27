"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense and MoE: images keep their aspect ratio, and positions have three axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from chiasm.errors import InvalidRequestError, UnsupportedModelError
from chiasm.models.base import ItemGeometry, Positions, Prompt
from chiasm.models.families.base import LARGEST_ASPECT, Family, ProcessorParts, too_elongated

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

GRID_KEY = "image_grid_thw"


class QwenVL(Family):
    """An image is resized to whole cells of merge x merge patches, and each cell becomes one token."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    vision_types = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision")
    metadata_key = GRID_KEY

    def __init__(self, parts: ProcessorParts) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = parts.image_processor
        vision = parts.config.vision_config
        if not processor.do_resize:
            raise UnsupportedModelError(
                "The preprocessor config sets do_resize to false, which chiasm doesn't support."
            )
        sizes = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        if sizes != (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size):
            raise UnsupportedModelError(
                "config.json and the preprocessor config disagree on patch and merge sizes. Download the checkpoint again."
            )
        self._smart_resize = smart_resize
        self._processor = processor
        self._merge = int(processor.merge_size)
        self._patch = int(processor.patch_size)
        self._min_pixels = int(processor.size["shortest_edge"])
        self._max_pixels = int(processor.size["longest_edge"])
        self.placeholder_id = int(parts.config.image_token_id)

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        try:
            resized = self._smart_resize(
                height, width, self._patch * self._merge, min_pixels=self._min_pixels, max_pixels=self._max_pixels
            )
        except ValueError as error:
            raise too_elongated(height, width) from error
        return self._geometry_of_grid(resized[0] // self._patch, resized[1] // self._patch)

    def geometry_of_values(self, values: list[int]) -> ItemGeometry:
        if len(values) != 3:
            raise InvalidRequestError(f"{GRID_KEY} must be [t, h, w].")
        frames, height, width = values
        if frames != 1:
            raise InvalidRequestError(f"{GRID_KEY} of an image must have t = 1.")
        if min(height, width) < 1 or height % self._merge or width % self._merge:
            raise InvalidRequestError(f"In {GRID_KEY}, h and w must be positive multiples of {self._merge}.")
        if height * width * self._patch**2 > self._most_pixels():
            raise InvalidRequestError(f"{GRID_KEY} is larger than any image of this model.")
        return self._geometry_of_grid(height, width)

    def preprocess(self, image: Image) -> dict[str, Tensor]:
        features = self._processor(images=[image], return_tensors="pt")
        return {"pixel_values": features["pixel_values"], GRID_KEY: features[GRID_KEY]}

    @staticmethod
    def image_text(placeholder: str) -> str:
        """Return the placeholder between the tokens that the family's chat templates write around it."""
        return f"<|vision_start|>{placeholder}<|vision_end|>"

    @staticmethod
    def positions(config: Any, prompt: Prompt) -> Positions:
        """Return M-RoPE positions. A text token advances all three axes by one; the tokens of an image form a grid, and the
        text after it continues past the longer side of the grid."""
        merge = int(config.vision_config.spatial_merge_size)
        pieces: list[Tensor] = []
        position = index = 0
        for item in prompt.items:
            _, height, width = item.geometry.metadata[GRID_KEY]
            rows, columns = height // merge, width // merge
            before = item.offset - index
            pieces.append(torch.arange(before).expand(3, -1) + position)
            position += before
            grid = torch.meshgrid(
                torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns), indexing="ij"
            )
            pieces.append(torch.stack(grid).view(3, -1) + position)
            position += max(rows, columns)
            index = item.offset + item.length
        rest = len(prompt.token_ids) - index
        pieces.append(torch.arange(rest).expand(3, -1) + position)
        return Positions(torch.cat(pieces, dim=1), position + rest - len(prompt.token_ids))

    def _geometry_of_grid(self, height: int, width: int) -> ItemGeometry:
        tokens = height * width // self._merge**2
        return ItemGeometry((self.placeholder_id,) * tokens, tuple(range(tokens)), {GRID_KEY: [1, height, width]})

    def _most_pixels(self) -> int:
        """Return the largest area after resizing: ``max_pixels``, plus what rounding to whole cells adds to very elongated
        images and to images that are scaled up to ``min_pixels``."""
        cell = self._patch * self._merge
        narrowest = cell * math.ceil(math.sqrt(LARGEST_ASPECT * self._max_pixels))
        longest, shortest = math.sqrt(LARGEST_ASPECT * self._min_pixels), math.sqrt(self._min_pixels / LARGEST_ASPECT)
        scaled_up = self._min_pixels + math.ceil(cell * (longest + shortest)) + cell**2
        return max(self._max_pixels, narrowest, scaled_up)
