"""What a Qwen-VL checkpoint itself answers: greedy generation with plain transformers, one request at a time.

``AutoProcessor`` needs torchvision for Qwen's video processor. The tokenizer and the image processor do the same for images
if each placeholder is repeated as often as its image has tokens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

_PLACEHOLDER = "<|image_pad|>"
_MAX_TOKENS = 48


class Reference:
    """A whole checkpoint. Make and use it in one thread. Raises ValueError for families other than Qwen-VL."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
        if not self.model.config.model_type.startswith("qwen"):
            raise ValueError(f"there is no reference for models of type {self.model.config.model_type}")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(_PLACEHOLDER)

    def messages(self, images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
        """Return one user message: the images, then the question."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def inputs(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Return the model's inputs: ids, mask and token types [1, T] int64; pixels and grids of all images."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        items = [self.processor(images=[image], return_tensors="pt") for image in images]
        first, *pieces = text.split(_PLACEHOLDER)
        assert len(pieces) == len(items), "the numbers of placeholders and images differ"
        text = first
        for item, piece in zip(items, pieces, strict=True):
            tokens = int(item["image_grid_thw"].prod()) // self.processor.merge_size**2
            text += _PLACEHOLDER * tokens + piece
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if items:
            found["mm_token_type_ids"] = (ids == self.image_id).long()
            found["pixel_values"] = torch.cat([item["pixel_values"] for item in items])
            found["image_grid_thw"] = torch.cat([item["image_grid_thw"] for item in items])
        return found

    @torch.inference_mode()
    def generate(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Image.Image],
        *,
        max_tokens: int = _MAX_TOKENS,
        zero_embeddings: bool = False,
    ) -> list[int]:
        """Return the greedily generated token ids, the end token included.

        ``zero_embeddings`` replaces the vision tower's output, DeepStack levels included, by zeros.
        """
        inputs = self.inputs(messages, images)
        handle = self.model.model.visual.register_forward_hook(_zeroed) if zero_embeddings else None
        try:
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        finally:
            if handle is not None:
                handle.remove()
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]

    def text(self, ids: Sequence[int]) -> str:
        """Return generated tokens as text, without the end token."""
        ends = self.model.generation_config.eos_token_id
        return str(
            self.tokenizer.decode([one for one in ids if one not in (ends if isinstance(ends, list) else [ends])])
        )

    def answer(self, images: Sequence[Image.Image], question: str, *, zero_embeddings: bool = False) -> str:
        """Return the answer to one question about images as text."""
        return self.text(self.generate(self.messages(images, question), images, zero_embeddings=zero_embeddings))

    def answer_tokens(self, files: Sequence[bytes], question: str, max_tokens: int) -> list[str]:
        """Return the answer to one question about image files, each token as text of its own, the end token included."""
        images = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB") for data in files]
        ids = self.generate(self.messages(images, question), images, max_tokens=max_tokens)
        return [str(self.tokenizer.decode([one])) for one in ids]


def _zeroed(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    output.pooler_output = torch.zeros_like(output.pooler_output)
    output.deepstack_features = [torch.zeros_like(level) for level in output.deepstack_features]
    return output
