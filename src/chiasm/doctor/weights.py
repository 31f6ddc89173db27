"""How much memory the weights of each role take, by the headers of a checkpoint's files: no tensor is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.models.checkpoint import Checkpoint

_MAX_HEADER_BYTES = 100 << 20
_VISION = frozenset(
    {
        "visual",
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "image_newline",
        "mlp1",
    }
)
"""Parts of the names of the vision tower's and the projector's tensors, in all families."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Weights:
    """Numbers of a checkpoint's parameters."""

    vision: int
    language: int

    def bytes_of(self, dtype: str, *, vision: bool, language: bool) -> int:
        """In memory, once they are in ``dtype``."""
        return (self.vision * vision + self.language * language) * _ITEM_BYTES.get(dtype, 2)


def read_weights(checkpoint: Checkpoint) -> Weights:
    """Raises ConfigurationError where files are missing or damaged."""
    vision = language = 0
    for file in checkpoint.weight_files():
        for name, count in _parameters(file):
            if _VISION.isdisjoint(name.split(".")):
                language += count
            else:
                vision += count
    return Weights(vision, language)


def dtype_in_use(checkpoint: Checkpoint, asked: str, *, on_cpu: bool, is_vllm: bool) -> str:
    """What ``--dtype`` comes to: of ``auto``, the built-in engine makes float32 on CPU, otherwise the checkpoint's."""
    if asked != "auto":
        return asked
    if on_cpu and not is_vllm:
        return "float32"
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or checkpoint.text_config.get("dtype")
    return str(own or "bfloat16")


def _parameters(file: Path) -> list[tuple[str, int]]:
    """Names and sizes of the tensors of a safetensors file, and that the file is as long as they say."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header has no end")
            header = json.loads(stream.read(length))
            tensors = [(name, tensor) for name, tensor in header.items() if name != "__metadata__"]
            end = max((tensor["data_offsets"][1] for _, tensor in tensors), default=0)
            if file.stat().st_size != 8 + length + end:
                raise ValueError("it is shorter or longer than its header says")
            return [(name, math.prod(tensor["shape"])) for name, tensor in tensors]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigurationError(f"{file} is no whole safetensors file: {error}") from error
