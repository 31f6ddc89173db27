"""The connector for instances of one host: a consumer maps the producer's KV cache and copies blocks straight from it."""

from __future__ import annotations

from chiasm.kv_transfer.pull import PullConnector
from chiasm.transfer.memory import DataPlane
from chiasm.transfer.shared_memory import SharedMemoryPlane


class SharedMemoryConnector(PullConnector):
    """Moves blocks in host memory between processes of one host, one user and one pid namespace."""

    def make_plane(self) -> DataPlane:
        return SharedMemoryPlane(self.config.device)
