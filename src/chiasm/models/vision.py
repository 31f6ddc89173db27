"""The vision tower of a checkpoint, run one item a call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chiasm.models.base import Pixels, VisionModel
from chiasm.models.checkpoint import open_checkpoint
from chiasm.models.loading import load_role
from chiasm.models.support import entry_width, load_config

if TYPE_CHECKING:
    from torch import Tensor, nn


class TransformersVisionModel(VisionModel):
    """The encoder half of a transformers model, which all have behind ``get_image_features``."""

    def __init__(self, module: nn.Module, entry_width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.module = module
        self.entry_width = entry_width
        self.dtype = dtype
        self.device = device
        self._features: Any = module.get_image_features

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in pixels.inputs.items()}
        output = self._features(**inputs, return_dict=True)
        levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        entry = torch.cat([_rows(level) for level in levels], dim=-1)
        assert entry.shape == (len(pixels.geometry.rows), self.entry_width), (entry.shape, self.entry_width)
        return entry.to(self.dtype).contiguous()


def _rows(features: Any) -> Tensor:
    """Features of one item as ``[rows, width]``: models give a list of items, or a tensor of tiles."""
    parts = list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def load_vision(folder: Path, *, dtype: torch.dtype, device: torch.device) -> VisionModel:
    """The vision tower and projector of a checkpoint. Raises ConfigurationError, UnsupportedModelError."""
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    module = load_role(checkpoint, config, "vision", dtype=dtype, device=device)
    return TransformersVisionModel(module, entry_width(config), dtype, device)
