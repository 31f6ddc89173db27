"""What ``ec_connector_extra_config`` may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from chiasm.ec_transfer import ECTransferConfig
from chiasm.errors import ConfigurationError

_DEFAULT_MAX_BYTES = ECTransferConfig.max_bytes
_DEFAULT_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """The folder that instances share, how much it may hold, and how long a request waits for an entry.

    ``fingerprint`` replaces the one that is computed from the checkpoint, for models that cannot be read as a folder of
    safetensors files; all instances that share entries then need the same.
    """

    shared_storage_path: Path
    max_bytes: int = _DEFAULT_MAX_BYTES
    wait_seconds: float = _DEFAULT_WAIT_SECONDS
    fingerprint: str | None = None

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Raises ConfigurationError for a setting that is missing, unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(extra.keys() - set(names)):
            raise ConfigurationError(
                f"ec_connector_extra_config has no setting {', '.join(map(repr, unknown))}; there are {', '.join(names)}"
            )
        path = extra.get("shared_storage_path")
        if not isinstance(path, str) or not path:
            raise ConfigurationError(
                "ec_connector_extra_config needs shared_storage_path, the folder that encoders and PDs share"
            )
        max_bytes = extra.get("max_bytes", _DEFAULT_MAX_BYTES)
        if type(max_bytes) is not int:
            raise ConfigurationError(f"max_bytes must be a whole number of bytes, not {max_bytes!r}")
        wait_seconds = extra.get("wait_seconds", _DEFAULT_WAIT_SECONDS)
        if type(wait_seconds) not in (int, float) or not 0 <= wait_seconds < float("inf"):
            raise ConfigurationError(f"wait_seconds must be a number of seconds from 0, not {wait_seconds!r}")
        fingerprint = extra.get("fingerprint")
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise ConfigurationError(f"fingerprint must be hex digits in a string, not {fingerprint!r}")
        return cls(Path(path), max_bytes, float(wait_seconds), fingerprint)
