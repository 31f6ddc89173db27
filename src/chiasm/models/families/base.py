"""What differs from one family of checkpoints to the next."""

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
"""Metadata key that all families take: the image's height and width."""
LARGEST_ASPECT = 200
"""The largest ratio of the longer side to the shorter, where a family must bound it."""


@dataclass(frozen=True)
class ProcessorParts:
    """What the files of a checkpoint give, other than weights."""

    config: Any
    """The PreTrainedConfig."""
    tokenizer: Any
    """The PreTrainedTokenizerFast."""
    image_processor: Any
    """The image processor, of the PIL backend."""
    processor_config: JsonObject
    """``processor_config.json``, empty where there is none."""

    def token_id(self, token: str) -> int:
        """The id of a token that the family's images need."""
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise UnsupportedModelError(f"The tokenizer has no token {token!r}, which images of this family need.")
        return int(token_id)


class Family(ABC):
    """How images of one family become placeholders, pixels and positions."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of ``model_type`` in config.json."""
    vision_types: ClassVar[tuple[str, ...]]
    """Values of ``vision_config.model_type``."""
    metadata_key: ClassVar[str] = SIZE_KEY
    """The key of an item's metadata on the wire."""

    placeholder_id: int
    """The token that the chat template writes once for an image part, and that embedding rows replace."""

    @abstractmethod
    def __init__(self, parts: ProcessorParts) -> None:
        """Raises UnsupportedModelError for settings that the family doesn't follow."""

    @abstractmethod
    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        """The geometry of an image. Raises InvalidRequestError for a size that the image processor refuses."""

    def geometry_of_values(self, values: list[int]) -> ItemGeometry:
        """The geometry from the value under ``metadata_key``, hostile until checked, where that is not the size."""
        raise NotImplementedError

    @abstractmethod
    def preprocess(self, image: Image) -> dict[str, Tensor]:
        """The keyword arguments of the model's ``get_image_features`` for one RGB image."""

    @staticmethod
    def positions(config: Any, prompt: Prompt) -> Positions:
        """Rotary positions: the index of the token, unless the family says otherwise."""
        return Positions(torch.arange(len(prompt.token_ids))[None], 0)


def too_elongated(height: int, width: int) -> InvalidRequestError:
    """The error for an image that is past ``LARGEST_ASPECT``."""
    return InvalidRequestError(
        f"An image of {width} by {height} pixels is too elongated: the longer side may be at most {LARGEST_ASPECT} "
        "times the shorter."
    )
