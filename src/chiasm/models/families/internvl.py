"""InternVL: an image becomes a grid of square tiles with about the same aspect ratio, and an overview tile."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from chiasm.errors import UnsupportedModelError
from chiasm.models.base import ItemGeometry
from chiasm.models.families.base import SIZE_KEY, Family, ProcessorParts

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# It warns of images that are 1 or 3 pixels wide, although it reads them right. Clients can send them at will, and must not fill
# the log.
logging.getLogger("transformers.image_utils").setLevel(logging.ERROR)
_CUT = {"crop_to_patches": True}
"""The model's own processor always cuts images into tiles, whatever the config of the image processor says."""


class InternVL(Family):
    """All tiles have the same number of tokens; one start and one end token enclose the image."""

    model_types = ("internvl",)
    vision_types = ("internvl_vision",)

    def __init__(self, parts: ProcessorParts) -> None:
        processor, vision = parts.image_processor, parts.config.vision_config
        tile = (processor.size["height"], processor.size["width"])
        if tile != _pair(vision.image_size):
            raise UnsupportedModelError(
                "config.json and the preprocessor config disagree on the size of a tile. Download the checkpoint again."
            )
        patch = _pair(vision.patch_size)
        shrink = int(1 / parts.config.downsample_ratio)
        self._processor = processor
        self._tokens_per_tile = (tile[0] // patch[0] // shrink) * (tile[1] // patch[1] // shrink)
        self._start = parts.token_id(getattr(parts.tokenizer, "start_image_token", None) or "<img>")
        self._end = parts.token_id(getattr(parts.tokenizer, "end_image_token", None) or "</img>")
        self.placeholder_id = int(parts.config.image_token_id)

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        tokens = self._tokens_per_tile * int(self._processor.get_number_of_image_patches(height, width, _CUT))
        return ItemGeometry(
            token_ids=(self._start, *(self.placeholder_id,) * tokens, self._end),
            rows=tuple(range(1, 1 + tokens)),
            metadata={SIZE_KEY: [height, width]},
        )

    def preprocess(self, image: Image) -> dict[str, Tensor]:
        return {"pixel_values": self._processor(images=[image], return_tensors="pt", **_CUT)["pixel_values"]}


def _pair(side: Any) -> tuple[int, int]:
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return int(height), int(width)
