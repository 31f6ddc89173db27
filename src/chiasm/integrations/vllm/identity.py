"""Which checkpoint an instance of vLLM runs, by the names that chiasm's own instances give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.models.identity import fingerprint

_CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors"]


def fingerprint_of(model_config: Any, given: str | None = None) -> str:
    """Of vLLM's ``ModelConfig``: ``given``, if it is set, else what a chiasm instance computes for checkpoint and dtype.

    Raises ConfigurationError for a checkpoint that is no folder of safetensors files.
    """
    return given or fingerprint(folder_of(model_config), dtype_name(model_config))


def dtype_name(model_config: Any) -> str:
    """``"bfloat16"``, as torch calls it."""
    return str(model_config.dtype).removeprefix("torch.")


def folder_of(model_config: Any) -> Path:
    """The checkpoint's folder: what ``--model`` names, or where the Hub's client has put it."""
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    downloaded = snapshot_download(model_config.model, revision=model_config.revision, allow_patterns=_CHECKPOINT_FILES)
    return Path(downloaded)
