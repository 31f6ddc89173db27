"""Plain greedy generation with transformers: what the checkpoint itself answers.

``AutoProcessor`` needs torchvision for Qwen's video processor; the image processor and the tokenizer
alone, with each placeholder repeated to its image's number of tokens, do the same for images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

_IMAGE = "<|image_pad|>"


class Reference:
    """A checkpoint folder loaded whole, answering one request at a time."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(_IMAGE)

    def messages(self, images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
        """Return one user message: the images, then the question."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def inputs(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Return the model's inputs: ids, mask and token types [1, T] int64; pixels and grids of all images."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        items = [self.processor(images=[image], return_tensors="pt") for image in images]
        pieces = text.split(_IMAGE)
        assert len(pieces) == len(items) + 1, "placeholders and images differ in number"
        text = pieces[0]
        for item, piece in zip(items, pieces[1:], strict=True):
            tokens = int(item["image_grid_thw"].prod()) // self.processor.merge_size**2
            text += _IMAGE * tokens + piece
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if items:
            found["mm_token_type_ids"] = (ids == self.image_id).long()
            found["pixel_values"] = torch.cat([item["pixel_values"] for item in items])
            found["image_grid_thw"] = torch.cat([item["image_grid_thw"] for item in items])
        return found

    @torch.inference_mode()
    def generate(
        self, messages: list[dict[str, Any]], images: Sequence[Image.Image], *, zero_embeddings: bool = False
    ) -> list[int]:
        """Return the greedily generated token ids, without the end token.

        ``zero_embeddings`` replaces the vision tower's output, DeepStack levels included, by zeros.
        """
        inputs = self.inputs(messages, images)
        visual = self.model.model.visual
        handle = visual.register_forward_hook(_zeroed) if zero_embeddings else None
        try:
            output = self.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        finally:
            if handle is not None:
                handle.remove()
        ends = self.model.generation_config.eos_token_id
        return [token for token in output if token not in ends]

    def answer(self, images: Sequence[Image.Image], question: str, *, zero_embeddings: bool = False) -> str:
        """Return the answer to one question about images as text."""
        ids = self.generate(self.messages(images, question), images, zero_embeddings=zero_embeddings)
        return str(self.tokenizer.decode(ids))


def _zeroed(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    output.pooler_output = torch.zeros_like(output.pooler_output)
    output.deepstack_features = [torch.zeros_like(level) for level in output.deepstack_features]
    return output
