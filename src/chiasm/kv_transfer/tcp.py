"""The connector for instances on any hosts that needs no library: blocks go over TCP."""

from __future__ import annotations

from chiasm.kv_transfer.pull import PullConnector
from chiasm.transfer.memory import DataPlane
from chiasm.transfer.tcp import TcpPlane


class TcpConnector(PullConnector):
    """Moves blocks in host memory between instances on any hosts. Its producers need Linux."""

    def make_plane(self) -> DataPlane:
        return TcpPlane(self.config.device)
