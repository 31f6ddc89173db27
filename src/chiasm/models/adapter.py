"""The vision tower and the decoder of a checkpoint, which transformers loads. It also runs the tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chiasm.models import tower
from chiasm.models.base import Attention, LanguageModel, LoadProgress, Pixels, Positions, Prompt, VisionModel
from chiasm.models.checkpoint import open_checkpoint
from chiasm.models.decoder import RMSNorm, Rotary, take_layers
from chiasm.models.loading import as_stored, load_part, model_class
from chiasm.models.processor import load_processor
from chiasm.models.products import MakeProduct, Product, forget_weight, product
from chiasm.models.support import check_weights, entry_width, family_of, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from chiasm.models.checkpoint import Checkpoint
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
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: LoadProgress | None = None,
    make_product: MakeProduct = product,
) -> LanguageModel:
    """Load the decoder and head of a checkpoint, and count in ``progress``. Its products are made by ``make_product``.

    Raises ConfigurationError, UnsupportedModelError.
    """
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    module = load_part(checkpoint, config, "language", dtype=dtype, device=device, progress=progress)
    language = TransformersLanguageModel(
        module, config, family_of(config), entry_width(config), dtype, device, make_product
    )
    if device.type == "cpu":
        _leave_table_in_file(checkpoint, module)
    return language


def _leave_table_in_file(checkpoint: Checkpoint, module: Any) -> None:
    """Have the embeddings of tokens looked up in the checkpoint's file, unless the head computes with the same weight.

    A packed head is a copy, so the table of a model with tied weights takes no memory beside it.
    """
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()
    if head.weight is not embed.weight:
        embed.weight = nn.Parameter(as_stored(checkpoint, embed.weight), requires_grad=False)


def import_classes(folder: Path) -> None:
    """Import what the processor and both parts of a checkpoint consist of, and read no weights.

    Raises ConfigurationError, UnsupportedModelError.
    """
    checkpoint = open_checkpoint(folder)
    check_weights(checkpoint)
    model_class(load_config(checkpoint))
    load_processor(folder)


class TransformersVisionModel(VisionModel):
    """The encoder half of a transformers model, behind the model's ``get_image_features``."""

    def __init__(self, module: nn.Module, entry_width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.module = module
        self.entry_width = entry_width
        self.dtype = dtype
        self.device = device
        self._features: Any = module.get_image_features
        tower.speed_up(module)

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
    """The decoder half of a transformers model, computed by :mod:`chiasm.models.decoder`."""

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        family: type[Family],
        entry_width: int,
        dtype: torch.dtype,
        device: torch.device,
        make_product: MakeProduct,
    ) -> None:
        """Raises UnsupportedModelError if the decoder has parts that aren't known."""
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
        decoder = outer.get_decoder()
        self.head_dim = int(decoder.layers[0].self_attn.head_dim)
        self._embed = outer.get_input_embeddings()
        self._rotary = Rotary(decoder.rotary_emb, self.head_dim, dtype)
        self._layers = take_layers(decoder, make_product)
        self._norm = RMSNorm.of(decoder.norm)
        self._head = _head(outer.get_output_embeddings(), make_product)

    def positions(self, prompt: Prompt) -> Positions:
        return self._family.positions(self._config, prompt)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        entry_rows: Tensor | None = None,
        entry_index: Tensor | None = None,
    ) -> Tensor:
        hidden: Tensor = self._embed(token_ids)
        if hidden.dtype != self.dtype:
            hidden = hidden.to(self.dtype)
        deeper: list[Tensor] = []
        if entry_rows is not None and entry_index is not None:
            # Level 0 replaces the placeholders; the DeepStack levels are added after the first layers.
            first, *deeper = torch.split(entry_rows.to(self.dtype), self.hidden_size, dim=1)
            hidden = hidden.index_copy(0, entry_index, first)
        rotation = self._rotary(position_ids)
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, rotation, attention)
            if index < len(deeper) and entry_index is not None:
                hidden = hidden.index_add(0, entry_index, deeper[index])
        return self._norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        return logits if logits.dtype == torch.float32 else logits.float()


def _head(head: nn.Linear, make: MakeProduct) -> Product:
    """Return the product that makes logits. Tied weights that it packs stay with the table of embeddings."""
    compute, is_packed = make(head.weight.detach(), head.bias)
    if is_packed:
        forget_weight(head)
    return compute
