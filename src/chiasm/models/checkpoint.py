"""The files of a checkpoint in the Hugging Face layout, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigurationError

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json``, safetensors weights, tokenizer and preprocessor files."""

    folder: Path
    config: JsonObject
    """``config.json`` as written: what it leaves out is left out here too, not filled with a class's defaults."""
    generation_config: JsonObject
    """``generation_config.json``, empty where there is none."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def text_config(self) -> JsonObject:
        """The language model's part of the config."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, sorted by name."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConfigurationError(f"{index} has no weight_map; download the checkpoint again.")
            files = [self.folder / name for name in sorted({str(name) for name in weight_map.values()})]
        else:
            files = [self.folder / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise ConfigurationError(
                    f"The weights {file} are missing. chiasm reads safetensors only: download the rest of the "
                    "checkpoint, or convert it with save_pretrained(folder, safe_serialization=True)."
                )
        return files


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the folder's configuration. Raises ConfigurationError where it is not a checkpoint."""
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{folder} is not a model checkpoint: it has no config.json.")
    generation_config = folder / "generation_config.json"
    return Checkpoint(
        folder=folder,
        config=read_json(folder / "config.json"),
        generation_config=read_json(generation_config) if generation_config.is_file() else {},
    )


def read_json(path: Path) -> JsonObject:
    """A file that holds one JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object.")
    return value
