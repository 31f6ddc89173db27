"""A checkpoint's files in the Hugging Face layout: found by name, and read without torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.ownership import within_reach

JsonObject = dict[str, Any]
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What is raised by reading JSON that is damaged, lacks a value or has a wrong one."""
AS_FILES: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a checkpoint. Otherwise it asks on a terminal whether it may run code that comes with one."""

Part = Literal["vision", "language"]
"""``language`` is the decoder and its head; ``vision`` is everything else."""

_VISION = frozenset(
    [
        "visual",
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "image_newline",
        "mlp1",
    ]
)
"""Parts of the names of the vision tower's and the projector's tensors, in all families."""
_MAX_HEADER_BYTES = 100 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json``, safetensors weights, tokenizer and preprocessor files."""

    folder: Path
    config: JsonObject
    """``config.json`` as written, without the defaults of a config class."""
    generation_config: JsonObject
    """``generation_config.json``; empty if there is no such file."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def text_config(self) -> JsonObject:
        """The part of the config that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that hold the weights, sorted by name. Raises ConfigurationError if one is missing.

        They are those that transformers loads: an index is of no use beside a single file, and may be an earlier model's.
        """
        single, index = (self.folder / name for name in ("model.safetensors", "model.safetensors.index.json"))
        if index.is_file() and not single.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConfigurationError(f"{index} has no weight_map. Download the checkpoint again.")
            files = [self.folder / name for name in sorted({str(name) for name in weight_map.values()})]
        else:
            files = [single]
        for file in files:
            if not file.is_file():
                raise ConfigurationError(
                    f"The weights {file} are missing. chiasm reads only safetensors: download the rest of the checkpoint, "
                    "or convert it with save_pretrained(folder, safe_serialization=True)."
                )
        return files


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration in a folder. Raises ConfigurationError if the folder is not a checkpoint."""
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{folder} is not a model checkpoint: it has no config.json.")
    generation_config = folder / "generation_config.json"
    return Checkpoint(
        folder=folder,
        config=read_json(folder / "config.json"),
        generation_config=read_json(generation_config) if generation_config.is_file() else {},
    )


def read_json(path: Path) -> JsonObject:
    """Return the JSON object in a file. Raises ConfigurationError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *MALFORMED) as error:
        raise ConfigurationError(f"Cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object.")
    return value


@contextmanager
def told(message: str) -> Iterator[None]:
    """A block in which transformers reads files; it raises anything where they lack a value or have a wrong one.

    Raises ConfigurationError, which begins with ``message``.
    """
    try:
        yield
    except ChiasmError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(f"{message}: {reason}. Download the checkpoint again.") from error


def config_if_readable(folder: Path) -> JsonObject:
    """Return a folder's ``config.json``; empty if it can't be read, which is for what loads the model to report."""
    try:
        return read_json(folder / "config.json")
    except ConfigurationError:
        return {}


class StoredTensor(NamedTuple):
    """What a safetensors file says of one of its tensors."""

    name: str
    numbers: int
    size_bytes: int

    @property
    def part(self) -> Part:
        """The part of the model that the tensor belongs to."""
        return "language" if _VISION.isdisjoint(self.name.split(".")) else "vision"


def stored_tensors(file: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file. Raises ConfigurationError if it isn't as long as its header says."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if file.stat().st_size != 8 + length + end:
                raise ValueError("it is shorter or longer than its header says")
            return [
                StoredTensor(name, math.prod(tensor["shape"]), tensor["data_offsets"][1] - tensor["data_offsets"][0])
                for name, tensor in header.items()
            ]
    except (OSError, *MALFORMED) as error:
        raise ConfigurationError(f"{file} is not a complete safetensors file: {error}") from error


def stored_bytes(folder: Path, part: Part | None = None) -> int:
    """Return the size of the weights in a folder, as far as they are here; what loads them reports files that are missing.

    With ``part``, only of those of this part; raises ConfigurationError if a file is damaged.
    """
    files = [file for file in folder.glob("*.safetensors") if file.is_file()]
    if part is None:
        return sum(file.stat().st_size for file in files)
    return sum(tensor.size_bytes for file in files for tensor in stored_tensors(file) if tensor.part == part)


def stored_dtype(config: JsonObject) -> str | None:
    """Return the name of the weights' dtype, such as ``bfloat16``; None if ``config.json`` doesn't say."""
    for part in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and isinstance(value := part.get(name), str):
                return value
    return None


def resolve_folder(model: str) -> Path:
    """Return a checkpoint's folder, given its path, the name of a shipped model, or a name on the Hugging Face hub.

    A model from the hub is downloaded once and then cached. Raises ConfigurationError.
    """
    return _folder_without_hub(model) or _download(model)


def cached_folder(model: str) -> Path | None:
    """Like :func:`resolve_folder` without the network: return None for a model of the hub that isn't in the cache."""
    folder = _folder_without_hub(model)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _folder_without_hub(model: str) -> Path | None:
    """Return None for a name on the hub. Raises ConfigurationError if it names no model at all."""
    from chiasm import checkpoints

    path = Path(os.path.expanduser(model))
    if model and within_reach(path / "config.json").is_file():
        return path
    if model in checkpoints.names():
        return checkpoints.folder(model)
    if path.exists() or not _HUB_NAME.fullmatch(model):
        raise ConfigurationError(
            f"There is no model {model!r}. Give the path of a checkpoint folder, which has a config.json, one of the "
            f"shipped models ({', '.join(checkpoints.names())}), or a name on the Hugging Face hub such as "
            "Qwen/Qwen3-VL-2B-Instruct."
        )
    return None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"{name} is not a folder, and cannot be downloaded from the Hugging Face hub. Check the name and the network, "
            "log in with `hf auth login` if the model is gated, or download it elsewhere and give the path of its folder: "
            f"{error}"
        ) from error
