"""What transformers' own ``generate`` answers to a request."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


class Reference:
    """A checkpoint loaded whole, for greedy answers to one request at a time, in float32.

    For families whose image processor gives ``image_grid_thw`` (Qwen): ``AutoProcessor`` needs torchvision there, but the
    tokenizer and the image processor, and placeholders repeated as often as an image has tokens, do the same.
    Raises ValueError for other families. It computes in one thread: several wait for each other at every operator, which
    on a busy machine takes far longer than what they have to do. Make and use it in the same thread.
    """

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(1)
        disable_progress_bar()  # the bench has its own
        self._model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
        if not self._model.config.model_type.startswith("qwen"):
            raise ValueError(f"no reference for models of type {self._model.config.model_type}")
        self._image_id = int(self._model.config.image_token_id)

    def answer(self, images: Sequence[bytes], question: str, max_tokens: int) -> list[str]:
        """The tokens of the answer as text, each by itself, the end token included."""
        import torch

        items = [self._processor(images=[_rgb(data)], return_tensors="pt") for data in images]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        message = {"role": "user", "content": content if images else question}
        text = self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        waiting = list(items)
        for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token == self._image_id:
                grid = waiting.pop(0)["image_grid_thw"]
                ids += [token] * (int(grid.prod()) // self._processor.merge_size**2)
            else:
                ids.append(token)
        input_ids = torch.tensor([ids])
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if items:
            inputs["mm_token_type_ids"] = (input_ids == self._image_id).long()
            inputs["pixel_values"] = torch.cat([item["pixel_values"] for item in items])
            inputs["image_grid_thw"] = torch.cat([item["image_grid_thw"] for item in items])
        with torch.inference_mode():
            output = self._model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        return [self._tokenizer.decode([token]) for token in output[0, len(ids) :].tolist()]


def _rgb(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
