"""A stand-in for an engine, which calls both halves of a connector in the same order as an engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chiasm.ec_transfer import (
    ECConnectorFactory,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    ECTransferRole,
)


@dataclass(frozen=True)
class Item:
    identifier: str
    offset: int = 0
    length: int = 4


@dataclass(frozen=True)
class Request:
    """A request as an engine passes it to connectors; ``kv_transfer_params`` concerns only KV connectors."""

    items: tuple[Item, ...] = ()
    request_id: str = "request"
    kv_transfer_params: dict[str, object] = field(default_factory=dict)


def identifier_of(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def embedding_of(name: object, rows: int = 4, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that is different for each name."""
    seed = int(identifier_of(name)[:12], 16)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry_path(folder: Path, identifier: str) -> Path:
    return folder / f"{identifier}.safetensors"


class Instance:
    """Both halves of an instance's connector, and the embeddings in its memory."""

    def __init__(self, config: ECTransferConfig) -> None:
        self.scheduler = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        self.worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        self.encoder_cache: dict[str, torch.Tensor] = {}

    def schedule(self, *requests: Request) -> ECConnectorMetadata:
        """The scheduler's part of a step: note every item that exists and is not in memory."""
        for request in requests:
            for index, item in enumerate(request.items):
                if item.identifier not in self.encoder_cache and self.scheduler.has_cache_item(item.identifier):
                    self.scheduler.update_state_after_alloc(request, index)
        return self.scheduler.build_connector_meta()

    def execute(self, metadata: ECConnectorMetadata) -> None:
        """The worker's part of a step."""
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_caches(self.encoder_cache)
        self.worker.clear_connector_metadata()

    def step(self, *requests: Request) -> ECConnectorMetadata:
        metadata = self.schedule(*requests)
        self.execute(metadata)
        return metadata

    def encode(self, name: object, embedding: torch.Tensor | None = None) -> str:
        """Make and publish the item's embedding, like an encoder."""
        identifier = identifier_of(name)
        self.encoder_cache[identifier] = embedding_of(name) if embedding is None else embedding
        self.worker.save_caches(self.encoder_cache, identifier)
        return identifier

    def load(self, identifier: str) -> torch.Tensor | None:
        """Load the item's embedding for a request that has only this item."""
        self.encoder_cache.pop(identifier, None)
        self.step(Request((Item(identifier),)))
        return self.encoder_cache.get(identifier)


def config_for(folder: Path | None, role: ECTransferRole = ECTransferRole.BOTH, **changes: Any) -> ECTransferConfig:
    return ECTransferConfig(
        role=role, connector_extra_config={"shared_storage_path": folder}, fingerprint="5eed", **changes
    )
