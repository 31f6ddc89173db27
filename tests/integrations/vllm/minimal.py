"""The smallest connector that a user could write: entries in the memory of one process, and nothing that isn't abstract."""

from __future__ import annotations

import torch

from chiasm.ec_transfer import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    RequestLike,
    check_identifier,
)

ENTRIES: dict[str, torch.Tensor] = {}


class MinimalConnector(ECConnector):
    """Moves entries between instances of one process."""

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        super().__init__(config, role)
        self._noted: dict[str, None] = {}

    def has_cache_item(self, identifier: str) -> bool:
        return check_identifier(identifier) in ENTRIES

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        if self.is_consumer:
            self._noted[check_identifier(request.items[index].identifier)] = None

    def build_connector_meta(self) -> ECConnectorMetadata:
        metadata = ECConnectorMetadata(tuple(self._noted))
        self._noted.clear()
        return metadata

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        for identifier in self._metadata.loads if self._metadata is not None else ():
            if identifier in ENTRIES:
                encoder_cache.setdefault(identifier, ENTRIES[identifier])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        ENTRIES[check_identifier(mm_hash)] = encoder_cache[mm_hash]
