"""The connector for instances on any hosts with a fast network: NIXL reads embeddings over the transport that UCX finds."""

from __future__ import annotations

from chiasm.ec_transfer.peers import LandingConnector
from chiasm.transfer.memory import DataPlane
from chiasm.transfer.nixl import NixlPlane


class NixlConnector(LandingConnector):
    """Moves embeddings between the host memories of instances on any hosts. Raises ConfigurationError without NIXL."""

    def make_plane(self) -> DataPlane:
        return NixlPlane(f"ec-{self.engine_id}")
