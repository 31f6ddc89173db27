"""From what a person calls a model to its folder."""

from __future__ import annotations

import re
from pathlib import Path

from chiasm.errors import ConfigurationError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]


def resolve_folder(model: str) -> Path:
    """The folder of a checkpoint: a path, the name of a shipped one, or a name on the Hugging Face hub.

    Raises ConfigurationError that says what to do where there is none. A hub name is downloaded once, then cached.
    """
    from chiasm import checkpoints

    path = Path(model).expanduser()
    if model and (path / "config.json").is_file():
        return path
    if model in checkpoints.names():
        return checkpoints.folder(model)
    if path.exists() or not _HUB_NAME.fullmatch(model):
        raise ConfigurationError(
            f"There is no model {model!r}. Give the path of a checkpoint folder, which has a config.json, one of the "
            f"shipped models ({', '.join(checkpoints.names())}), or a name on the Hugging Face hub such as "
            "Qwen/Qwen3-VL-2B-Instruct."
        )
    return _download(model)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"{name} is neither a folder nor could it be fetched from the Hugging Face hub: {error} "
            "Check the name and the network, log in with `hf auth login` if the model is gated, or download it "
            "elsewhere and give the path of its folder."
        ) from error
