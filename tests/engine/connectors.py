"""EC connectors as users write them, which engines of tests load by name."""

from __future__ import annotations

import threading
from typing import Any

import torch

from chiasm.ec_transfer import ECConnector, ECConnectorRole, ECTransferConfig, RequestLike
from chiasm.ec_transfer.shared_storage import SharedStorageConnector


class CountingConnector(SharedStorageConnector):
    """Counts how often it is asked, and notes which threads read entries."""

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        super().__init__(config, role)
        self.asked = 0
        self.readers: set[str] = set()

    def has_cache_item(self, identifier: str) -> bool:
        self.asked += 1
        return super().has_cache_item(identifier)

    def _verify(self, *args: Any, **options: Any) -> Any:
        self.readers.add(threading.current_thread().name)
        return super()._verify(*args, **options)


class SilentConnector(SharedStorageConnector):
    """Can't tell when an entry arrives, and brings none beside the steps."""

    set_wake = ECConnector.set_wake
    ensure_cache_available = ECConnector.ensure_cache_available
    request_finished = ECConnector.request_finished

    def shutdown(self) -> None:
        ECConnector.shutdown(self)
        super().shutdown()


class LossyConnector(SharedStorageConnector):
    """Loses what it has said yes to, at first before the step is planned, then before it is loaded."""

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        super().__init__(config, role)
        self.losses = 0

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        super().update_state_after_alloc(request, index)
        if self.losses == 0:
            self.losses += 1
            self._noted.clear()

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        if self.losses == 0:
            self.losses += 1
            return
        super().start_load_caches(encoder_cache)
