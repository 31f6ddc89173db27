"""What the connector is configured with: ``ec_connector_extra_config``, and the identity of the model that vLLM runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from chiasm.ec_transfer import ECConnectorFactory, ECTransferConfig, ECTransferRole
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.models.identity import fingerprint

_CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class Settings:
    """What ``ec_connector_extra_config`` may hold."""

    connector: str = ECTransferConfig.connector
    """Connector that moves embeddings."""
    connector_module_path: str | None = None
    """Python module of a connector that isn't chiasm's own."""
    shared_storage_path: Path | None = None
    """The folder that encoders and PDs share."""
    max_bytes: int = ECTransferConfig.max_bytes
    """Maximum size of what the folder, or the memory of an encoder, holds."""
    receive_bytes: int = ECTransferConfig.receive_bytes
    """Maximum size of the embeddings that are on their way to a PD."""
    host: str = ECTransferConfig.host
    """Address at which others reach the embeddings of an encoder; also its bind address."""
    port: int = ECTransferConfig.port
    """Port at that address; 0 takes a free one."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Settings that only the connector understands."""
    wait_seconds: float = 60.0
    """How long a request waits for an embedding before it fails."""
    fingerprint: str | None = None
    """Replaces the fingerprint that is computed from the checkpoint, for a model that is not a folder of safetensors files. All
    instances that share embeddings need the same."""

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Return the settings. Raises ConfigurationError if one is missing, unknown or of the wrong type."""
        names = [each.name for each in fields(cls)]
        if unknown := sorted(extra.keys() - set(names)):
            raise ConfigurationError(
                f"ec_connector_extra_config has no setting {', '.join(map(repr, unknown))}; its settings are "
                f"{', '.join(names)}."
            )
        for name, kind in _KINDS.items():
            if name in extra and type(extra[name]) not in kind.types:
                raise ConfigurationError(f"{name} must be {kind.described}, not {extra[name]!r}.")
        wait_seconds = extra.get("wait_seconds", cls.wait_seconds)
        if not 0 <= wait_seconds < float("inf"):
            raise ConfigurationError(f"wait_seconds must be 0 or a positive number of seconds, not {wait_seconds!r}.")
        if not 0 <= extra.get("port", 0) < 1 << 16:
            raise ConfigurationError(f"port must be a number from 0 to 65535, not {extra['port']}.")
        if not all(type(value) is str for value in extra.get("extra", {}).values()):
            raise ConfigurationError("extra must be an object whose values are strings.")
        path = extra.get("shared_storage_path")
        settings = cls(**{**extra, "shared_storage_path": Path(path) if path else None})
        if settings.uses_folder and not path:
            raise ConfigurationError(
                "ec_connector_extra_config needs shared_storage_path, the folder that encoders and PDs share."
            )
        return settings

    @property
    def uses_folder(self) -> bool:
        """Whether embeddings are exchanged through the folder, which any process can look at."""
        return self.connector_module_path is None and self.connector == ECTransferConfig.connector

    def transfer_config(
        self,
        role: ECTransferRole,
        *,
        fingerprint: str,
        device: str,
        in_one_process: bool,
        fleet_key: FleetKey | None,
    ) -> ECTransferConfig:
        """Return the configuration of a connector.

        Raises ConfigurationError if it doesn't exist. ``in_one_process``: whether there is one worker, in the scheduler's
        process.
        """
        config = ECTransferConfig(
            connector=self.connector,
            connector_module_path=self.connector_module_path,
            role=role,
            shared_storage_path=self.shared_storage_path,
            max_bytes=self.max_bytes,
            receive_bytes=self.receive_bytes,
            host=self.host,
            port=self.port,
            fingerprint=fingerprint,
            device=device,
            # Copies of the folder's files: truncating a file that is mapped ends the process, and with it vLLM's engine.
            separate_processes=self.uses_folder or not in_one_process,
            fleet_key=fleet_key,
            extra=dict(self.extra),
        )
        ECConnectorFactory.check_name(config)
        return config


class _Kind(NamedTuple):
    types: tuple[type, ...]
    described: str


_KINDS = {
    "connector": _Kind((str,), "the name of a connector"),
    "connector_module_path": _Kind((str, type(None)), "the name of a Python module"),
    "shared_storage_path": _Kind((str, type(None)), "a path"),
    "max_bytes": _Kind((int,), "a whole number of bytes"),
    "receive_bytes": _Kind((int,), "a whole number of bytes"),
    "host": _Kind((str,), "an address"),
    "port": _Kind((int,), "a whole number"),
    "extra": _Kind((dict,), "an object whose values are strings"),
    "wait_seconds": _Kind((int, float), "0 or a positive number of seconds"),
    "fingerprint": _Kind((str, type(None)), "a string of hex digits"),
}


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
