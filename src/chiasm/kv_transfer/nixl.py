"""The connector for instances on any hosts, in host or GPU memory: NIXL reads over the best transport that UCX finds."""

from __future__ import annotations

from chiasm.kv_transfer.pull import PullConnector
from chiasm.transfer.memory import DataPlane
from chiasm.transfer.nixl import NixlPlane


class NixlConnector(PullConnector):
    """Moves blocks between instances on any hosts. Its worker role raises ConfigurationError if NIXL or UCX is missing."""

    def make_plane(self) -> DataPlane:
        return NixlPlane(self.config.engine_id)
