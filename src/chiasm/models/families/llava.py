"""LLaVA 1.5 and similar models: every image is cropped to a square of fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.errors import UnsupportedModelError
from chiasm.models.base import ItemGeometry
from chiasm.models.families.base import LARGEST_ASPECT, SIZE_KEY, Family, ProcessorParts, too_elongated

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Llava(Family):
    """A CLIP or SigLIP tower over the square, with one token per patch."""

    model_types = ("llava",)
    vision_types = ("clip_vision_model", "siglip_vision_model")

    def __init__(self, parts: ProcessorParts) -> None:
        processor, vision = parts.image_processor, parts.config.vision_config
        if processor.do_pad:
            raise UnsupportedModelError("The preprocessor config sets do_pad, which chiasm doesn't support for LLaVA.")
        square = processor.crop_size if processor.do_center_crop else processor.size
        if not processor.do_resize or (square["height"], square["width"]) != (vision.image_size, vision.image_size):
            raise UnsupportedModelError(
                f"The preprocessor config must resize images to the {vision.image_size} pixels of the vision tower."
            )
        patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
        has_class_token = vision.model_type == "clip_vision_model"
        drops_first = parts.config.vision_feature_select_strategy == "default"
        self._processor = processor
        self._tokens = patches + int(has_class_token) - int(drops_first)
        self.placeholder_id = int(parts.config.image_token_id)

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        # The shorter side is scaled up to the square before cropping, so a very elongated image would grow without bound.
        if max(height, width) > LARGEST_ASPECT * min(height, width):
            raise too_elongated(height, width)
        return ItemGeometry(
            (self.placeholder_id,) * self._tokens, tuple(range(self._tokens)), {SIZE_KEY: [height, width]}
        )

    def preprocess(self, image: Image) -> dict[str, Tensor]:
        return {"pixel_values": self._processor(images=[image], return_tensors="pt")["pixel_values"]}
