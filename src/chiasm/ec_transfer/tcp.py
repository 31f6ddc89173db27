"""The connector for instances on any hosts that needs no library: embeddings go over TCP."""

from __future__ import annotations

from chiasm.ec_transfer.peers import LandingConnector
from chiasm.transfer.memory import DataPlane
from chiasm.transfer.tcp import TcpPlane


class TcpConnector(LandingConnector):
    """Moves embeddings between the host memories of instances on any hosts. Needs Linux."""

    def make_plane(self) -> DataPlane:
        return TcpPlane()
