from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECConnectorRole, ECTransferConfig, ECTransferRole
from chiasm.ec_transfer.shared_storage import SharedStorageConnector

from .engine import Engine, embedding_of, identifier_of


class Encoder:
    """A producer in another process, which publishes entries in the folder."""

    def __init__(self, folder: Path, fingerprint: str = "aa") -> None:
        config = ECTransferConfig(
            role=ECTransferRole.PRODUCER,
            connector_extra_config={"shared_storage_path": folder},
            fingerprint=fingerprint,
        )
        self._store = SharedStorageConnector(config, ECConnectorRole.WORKER)
        self._folder = folder

    def publish(self, name: str, embedding: torch.Tensor | None = None) -> Path:
        identifier = identifier_of(name)
        self._store.save_caches({identifier: embedding_of(name) if embedding is None else embedding}, identifier)
        return self.path(name)

    def path(self, name: str) -> Path:
        return self._folder / f"{identifier_of(name)}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


@pytest.fixture
def pd(folder: Path) -> Engine:
    return Engine(folder, ECTransferRole.CONSUMER)
