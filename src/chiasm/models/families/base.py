"""What differs between families of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from chiasm.errors import InvalidRequestError, UnsupportedModelError
from chiasm.models.base import ItemGeometry, Positions, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from chiasm.models.checkpoint import JsonObject

SIZE_KEY = "image_size"
"""The metadata key that every family accepts: the image's height and width."""
LARGEST_ASPECT = 200
"""The largest ratio of the longer side to the shorter, for families that have to limit it."""


@dataclass(frozen=True)
class ProcessorParts:
    """Everything that is read from the files of a checkpoint, except weights."""

    config: Any
    """The PreTrainedConfig."""
    tokenizer: Any
    """The PreTrainedTokenizerFast."""
    image_processor: Any
    """The image processor with the PIL backend."""
    processor_config: JsonObject
    """``processor_config.json``; empty if there is no such file."""

    def token_id(self, token: str) -> int:
        """Return the id of a token that images of the family need. Raises UnsupportedModelError if there is none."""
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise UnsupportedModelError(f"The tokenizer has no token {token!r}, which images of this family need.")
        return int(token_id)


class Family(ABC):
    """Turns images into placeholders, pixels and positions for one family of models."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of ``model_type`` in config.json."""
    vision_types: ClassVar[tuple[str, ...]]
    """Values of ``vision_config.model_type``."""
    metadata_key: ClassVar[str] = SIZE_KEY
    """The key of an item's metadata in the answers of encoders."""

    placeholder_id: int
    """The token that the chat template writes once for each image part, and that rows of the entry replace."""

    @abstractmethod
    def __init__(self, parts: ProcessorParts) -> None:
        """Raises UnsupportedModelError if the checkpoint has settings that this class does not implement."""

    @abstractmethod
    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        """Return the geometry of an image. Raises InvalidRequestError if the image processor refuses the size."""

    def geometry_of_values(self, values: list[int]) -> ItemGeometry:
        """Return the geometry for an untrusted value of ``metadata_key``. Only for families whose key isn't ``SIZE_KEY``."""
        raise NotImplementedError

    @abstractmethod
    def preprocess(self, image: Image) -> dict[str, Tensor]:
        """Turn an RGB image into keyword arguments of the model's ``get_image_features``."""

    @staticmethod
    def image_text(placeholder: str) -> str:
        """Return what stands for an image in a prompt whose chat template takes text alone; by default, the placeholder."""
        return placeholder

    @staticmethod
    def positions(config: Any, prompt: Prompt) -> Positions:
        """Return the rotary positions of a prompt; by default, a token's position is its index."""
        return Positions(torch.arange(len(prompt.token_ids))[None], 0)


def too_elongated(height: int, width: int) -> InvalidRequestError:
    """Return the error for an image that exceeds ``LARGEST_ASPECT``."""
    return InvalidRequestError(
        f"An image of {width} by {height} pixels is too elongated: the longer side may be at most {LARGEST_ASPECT} "
        "times the shorter."
    )
