"""One synthetic checkpoint of each family, loaded in parts, and as a whole for reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.bench import synthetic
from chiasm.models import load_language, load_processor, load_vision, products
from chiasm.models.base import LanguageModel, Pixels, Processor, Prompt, VisionModel
from chiasm.models.products import HAS_ONEDNN

CPU = torch.device("cpu")
HAS_ONEDNN_BFLOAT16: bool = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_best_form_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products of any size computed in the form of large ones."""
    for limit in ("LEAST_BYTES_IN_STRIPS", "LEAST_PACKED", "FEW_MULTIPLICATIONS"):
        monkeypatch.setattr(products, limit, 0)


class OneDnnProducts(TorchDispatchMode):
    """Notes how many numbers each product of oneDNN has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "_linear_pointwise" in str(function):
            self.sizes.append(result.numel())
        return result


@dataclass
class Loaded:
    """The parts of a checkpoint, each loaded when it is first used."""

    family: str
    folder: Path

    @cached_property
    def processor(self) -> Processor:
        return load_processor(self.folder)

    @cached_property
    def vision(self) -> VisionModel:
        return load_vision(self.folder, dtype=torch.float32, device=CPU)

    @cached_property
    def language(self) -> LanguageModel:
        return load_language(self.folder, dtype=torch.float32, device=CPU)

    @cached_property
    def whole(self) -> Any:
        """The model as transformers runs it, with its own attention and cache."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def prompt(self, pixels: Sequence[Pixels], text: str = "What is this?") -> Prompt:
        content: list[dict[str, str]] = [{"type": "image"} for _ in pixels]
        content.append({"type": "text", "text": text})
        items = [(f"{index:064x}", item.geometry) for index, item in enumerate(pixels)]
        return self.processor.build_chat([{"role": "user", "content": content}], items)

    def reference(self, prompt: Prompt, pixels: Sequence[Pixels], max_tokens: int) -> list[int]:
        """The greedy answer of the whole model."""
        token_ids = torch.tensor([prompt.token_ids])
        inputs: dict[str, torch.Tensor] = {}
        if pixels:
            along = 1 if self.family in ("idefics3", "smolvlm") else 0
            inputs = {name: torch.cat([item.inputs[name] for item in pixels], dim=along) for name in pixels[0].inputs}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = torch.zeros_like(token_ids)
            for item in prompt.items:
                inputs["mm_token_type_ids"][0, item.positions] = 1
        output = self.whole.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            **inputs,
        )
        answer: list[int] = output[0, len(prompt.token_ids) :].tolist()
        return answer


@pytest.fixture(autouse=True, scope="package")
def _torch() -> Iterator[None]:
    """Uses one thread, since more only slow down models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """Returns the checkpoint of a family, the same one for the whole session."""
    loaded: dict[str, Loaded] = {}

    def get(family: str) -> Loaded:
        if family not in loaded:
            loaded[family] = Loaded(family, synthetic.make(family, tmp_path_factory.mktemp(family)))
        return loaded[family]

    return get


@pytest.fixture(params=synthetic.FAMILIES)
def loaded(request: pytest.FixtureRequest, checkpoint: Callable[[str], Loaded]) -> Loaded:
    """The checkpoint of each family in turn."""
    return checkpoint(request.param)


@pytest.fixture
def edited(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> Callable[..., Path]:
    """Copies a checkpoint and replaces values in one of its JSON files."""

    def edit(family: str = "qwen3_vl", file: str = "config.json", **values: object) -> Path:
        folder = tmp_path / f"{family}-edited"
        if not folder.exists():
            shutil.copytree(checkpoint(family).folder, folder)
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))
        return folder

    return edit


def sample_image(seed: int, height: int = 40, width: int = 64) -> Image.Image:
    """An image of large coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
