"""The vision tower and the decoder of a checkpoint, run through the model classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chiasm.models.base import LanguageModel, LoadProgress, Pixels, Positions, Prompt, VisionModel
from chiasm.models.checkpoint import open_checkpoint
from chiasm.models.loading import load_part, model_class
from chiasm.models.processor import load_processor
from chiasm.models.support import entry_width, family_of, load_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from chiasm.models.families import Family


def load_vision(
    folder: Path, *, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None = None
) -> VisionModel:
    """Load the vision tower and projector of a checkpoint, and count in ``progress``.

    Raises ConfigurationError, UnsupportedModelError.
    """
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    module = load_part(checkpoint, config, "vision", dtype=dtype, device=device, progress=progress)
    return TransformersVisionModel(module, entry_width(config), dtype, device)


def load_language(
    folder: Path, *, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None = None
) -> LanguageModel:
    """Load the decoder and head of a checkpoint, and count in ``progress``. Raises ConfigurationError, UnsupportedModelError.

    ``ATTENTION_NAME`` must have been registered with transformers before.
    """
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    module = load_part(checkpoint, config, "language", dtype=dtype, device=device, progress=progress)
    return TransformersLanguageModel(module, config, family_of(config), entry_width(config), dtype, device)


def import_classes(folder: Path) -> None:
    """Import what the processor and both parts of a checkpoint consist of, and read no weights.

    Raises ConfigurationError, UnsupportedModelError.
    """
    model_class(load_config(open_checkpoint(folder)))
    load_processor(folder)


class TransformersVisionModel(VisionModel):
    """The encoder half of a transformers model, behind the model's ``get_image_features``."""

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
    """Return the features of one item as ``[rows, width]``; models return a list of items or a tensor of tiles."""
    parts = list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


class TransformersLanguageModel(LanguageModel):
    """The decoder half of a transformers model, with the engine's attention in place of its own."""

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        family: type[Family],
        entry_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        text = config.get_text_config()
        self.module = module
        self.hidden_size = int(text.hidden_size)
        self.entry_width = entry_width
        self.num_layers = int(text.num_hidden_layers)
        self.num_kv_heads = int(text.num_key_value_heads)
        self.vocab_size = int(text.vocab_size)
        self.dtype = dtype
        self.device = device
        self._config = config
        self._family = family
        outer: Any = module
        self._decoder = outer.get_decoder()
        self.head_dim = int(self._decoder.layers[0].self_attn.head_dim)
        self._embed = outer.get_input_embeddings()
        self._head = outer.get_output_embeddings()

    def positions(self, prompt: Prompt) -> Positions:
        return self._family.positions(self._config, prompt)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: object,
        entry_rows: Tensor | None = None,
        entry_index: Tensor | None = None,
    ) -> Tensor:
        embeds = self._embed(token_ids)
        extra: dict[str, object] = {}
        if entry_rows is not None and entry_index is not None:
            # Level 0 replaces the placeholders; the DeepStack levels are added after the first layers.
            first, *deeper = torch.split(entry_rows.to(self.dtype), self.hidden_size, dim=1)
            embeds = embeds.index_copy(0, entry_index, first)
            if deeper:
                visible = torch.zeros(token_ids.shape, dtype=torch.bool, device=self.device)
                extra["visual_pos_masks"] = visible.index_fill_(0, entry_index, True)[None]
                extra["deepstack_visual_embeds"] = deeper
        output = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=position_ids[:, None] if position_ids.shape[0] > 1 else position_ids,
            use_cache=False,
            paged=attention,
            **extra,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits.float()
