"""What the connector is configured with: ``ec_connector_extra_config``, the shared cache, and the identity of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from chiasm.connectors.extra_config import read_extra_config
from chiasm.ec_transfer import ECConnectorFactory, ECTransferConfig, ECTransferRole, moves_from_memory
from chiasm.ec_transfer.extra_config import EXTRA_CONFIGS
from chiasm.ec_transfer.stores.address import URL_VARIABLE
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.models.identity import fingerprint

FOLDER_CONNECTOR = "SharedStorageConnector"
_CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class Settings:
    """What ``ec_connector_extra_config`` may hold."""

    connector: str = ECTransferConfig.connector
    """Connector that moves embeddings."""
    connector_module_path: str | None = None
    """Python module of a connector that isn't chiasm's own."""
    max_bytes: int = ECTransferConfig.max_bytes
    """Maximum size of what the folder, or the memory of an encoder, holds."""
    receive_bytes: int = ECTransferConfig.receive_bytes
    """Maximum size of the embeddings that are on their way to a PD."""
    store_read_bytes: int = ECTransferConfig.store_read_bytes
    """Maximum size of the embeddings that are read from the shared cache ahead of their use."""
    store_queue_bytes: int = ECTransferConfig.store_queue_bytes
    """Maximum size of the embeddings that wait to be written to the shared cache."""
    wait_seconds: float = 60.0
    """How long a request waits for an embedding before it fails."""
    fingerprint: str | None = None
    """Replaces the fingerprint that is computed from the checkpoint, for a model that is not a folder of safetensors files. All
    instances that share embeddings need the same."""
    connector_extra_config: Mapping[str, Any] = field(default_factory=dict)
    """The connector's own settings: everything in ``ec_connector_extra_config`` that is none of the above."""

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Return the settings. Raises ConfigurationError if one is missing, unknown or of the wrong type."""
        if "extra" in extra:
            raise ConfigurationError(
                "ec_connector_extra_config has no setting 'extra'; write the connector's own settings beside the others."
            )
        names = [each.name for each in fields(cls) if each.name != "connector_extra_config"]
        own = {name: value for name, value in extra.items() if name in names}
        others = {name: value for name, value in extra.items() if name not in names}
        settings = replace(read_extra_config("ChiasmECConnector", own, cls), connector_extra_config=others)
        if not 0 <= settings.wait_seconds < float("inf"):
            raise ConfigurationError(
                f"wait_seconds must be 0 or a positive number of seconds, not {settings.wait_seconds!r}."
            )
        if settings.connector_module_path is None and settings.connector in EXTRA_CONFIGS:
            read_extra_config(settings.connector, others, EXTRA_CONFIGS[settings.connector], others=names)
        return settings

    @property
    def uses_folder(self) -> bool:
        """Whether embeddings are exchanged through the folder, which any process can look at."""
        return self.connector_module_path is None and self.connector == FOLDER_CONNECTOR

    @property
    def folder(self) -> Path | None:
        """The folder; None if there is none."""
        return Path(self.connector_extra_config["shared_storage_path"]) if self.uses_folder else None

    @property
    def moves_from_memory(self) -> bool:
        """Whether embeddings go from an encoder's memory to a language model's."""
        return moves_from_memory(self.connector, self.connector_module_path)

    def transfer_config(
        self,
        role: ECTransferRole,
        *,
        fingerprint: str,
        device: str,
        in_one_process: bool,
        fleet_key: FleetKey | None,
        store: str = "",
        dtype: str = "",
        entry_width: int = 0,
    ) -> ECTransferConfig:
        """Return the configuration of a connector.

        Raises ConfigurationError if it doesn't exist. ``in_one_process``: whether there is one worker, in the scheduler's
        process. ``store`` is the URL of the shared cache beside the connector.
        """
        config = ECTransferConfig(
            connector=self.connector,
            connector_module_path=self.connector_module_path,
            connector_extra_config=self.connector_extra_config,
            role=role,
            max_bytes=self.max_bytes,
            receive_bytes=self.receive_bytes,
            fingerprint=fingerprint,
            device=device,
            # Copies of the folder's files: truncating a file that is mapped ends the process, and with it vLLM's engine.
            separate_processes=self.uses_folder or not in_one_process,
            dtype=dtype,
            entry_width=entry_width,
            store=store,
            store_read_bytes=self.store_read_bytes,
            store_queue_bytes=self.store_queue_bytes,
            fleet_key=fleet_key,
        )
        ECConnectorFactory.check(config)
        return config


def settings_of(vllm_config: Any) -> Settings | None:
    """Return the settings of chiasm's connector in a ``VllmConfig``, or None if the instance doesn't use it.

    Raises ConfigurationError if they are wrong.
    """
    transfer = vllm_config.ec_transfer_config
    if transfer is None or not str(transfer.ec_connector_module_path or "").startswith("chiasm."):
        return None
    return Settings.read(transfer.ec_connector_extra_config)


def store_url(environment: Mapping[str, str] = os.environ) -> str:
    """Return the URL of the shared cache, or "". It isn't among the settings, which vLLM logs, since it may hold a password."""
    return environment.get(URL_VARIABLE, "")


def fingerprint_of(model_config: Any, given: str | None = None) -> str:
    """Return ``given``, or else what one of chiasm's own instances computes for the checkpoint and dtype of a ``ModelConfig``.

    Other settings of the processor than the checkpoint's own make another fingerprint. Raises ConfigurationError if the
    checkpoint is not a folder of safetensors files.
    """
    if given:
        return given
    own, changed = fingerprint(folder_of(model_config), dtype_name(model_config)), processor_settings(model_config)
    return blake3(f"{own} {json.dumps(changed, sort_keys=True, default=str)}".encode()).hexdigest() if changed else own


def processor_settings(model_config: Any) -> dict[str, Any]:
    """Return the settings of the processor that ``--mm-processor-kwargs`` changes, but for the device on which it runs."""
    given = getattr(model_config.multimodal_config, "mm_processor_kwargs", None) or {}
    return {name: value for name, value in given.items() if name != "device"}


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
