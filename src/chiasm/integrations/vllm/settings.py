"""What the connector is configured with: ``ec_connector_extra_config``, and the identity of the model that vLLM runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from chiasm.ec_transfer import ECTransferConfig
from chiasm.errors import ConfigurationError
from chiasm.models.identity import fingerprint

_CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class Settings:
    """What ``ec_connector_extra_config`` may hold."""

    shared_storage_path: Path
    """The folder that encoders and PDs share."""
    max_bytes: int = ECTransferConfig.max_bytes
    """Maximum size of what the folder holds."""
    wait_seconds: float = 60.0
    """How long a request waits for an embedding before it fails."""
    fingerprint: str | None = None
    """Replaces the fingerprint that is computed from the checkpoint, for a model that is not a folder of safetensors files. All
    instances that share embeddings need the same."""

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Return the settings. Raises ConfigurationError if one is missing, unknown or of the wrong type."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(extra.keys() - set(names)):
            raise ConfigurationError(
                f"ec_connector_extra_config has no setting {', '.join(map(repr, unknown))}; its settings are "
                f"{', '.join(names)}."
            )
        path = extra.get("shared_storage_path")
        if not isinstance(path, str) or not path:
            raise ConfigurationError(
                "ec_connector_extra_config needs shared_storage_path, the folder that encoders and PDs share."
            )
        max_bytes = extra.get("max_bytes", cls.max_bytes)
        if type(max_bytes) is not int:
            raise ConfigurationError(f"max_bytes must be a whole number of bytes, not {max_bytes!r}.")
        wait_seconds = extra.get("wait_seconds", cls.wait_seconds)
        if type(wait_seconds) not in (int, float) or not 0 <= wait_seconds < float("inf"):
            raise ConfigurationError(f"wait_seconds must be 0 or a positive number of seconds, not {wait_seconds!r}.")
        given = extra.get("fingerprint")
        if given is not None and not isinstance(given, str):
            raise ConfigurationError(f"fingerprint must be a string of hex digits, not {given!r}.")
        return cls(Path(path), max_bytes, float(wait_seconds), given)


def fingerprint_of(model_config: Any, given: str | None = None) -> str:
    """Return ``given``, or else what one of chiasm's own instances computes for the checkpoint and dtype of a ``ModelConfig``.

    Raises ConfigurationError if the checkpoint is not a folder of safetensors files.
    """
    return given or fingerprint(folder_of(model_config), dtype_name(model_config))


def dtype_name(model_config: Any) -> str:
    """Return torch's name of the dtype, such as ``bfloat16``."""
    return str(model_config.dtype).removeprefix("torch.")


def folder_of(model_config: Any) -> Path:
    """Return the checkpoint's folder: the one that ``--model`` names, or the one in the cache of the Hugging Face Hub."""
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    downloaded = snapshot_download(model_config.model, revision=model_config.revision, allow_patterns=_CHECKPOINT_FILES)
    return Path(downloaded)
