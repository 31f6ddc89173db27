"""The connector for instances of one host: the language model reads embeddings where the encoder has written them."""

from __future__ import annotations

from typing import ClassVar

from chiasm.ec_transfer.peer_messages import Welcome
from chiasm.ec_transfer.peers import PeerConnector
from chiasm.ec_transfer.sources import MappedSource, Source
from chiasm.transfer.memory import DataPlane, Memory, Peer
from chiasm.transfer.shared_memory import SharedMemory, SharedMemoryPlane


class SharedMemoryConnector(PeerConnector):
    """Moves embeddings between processes of one host, one user and one pid namespace, with one copy, into the encoder's memory.

    There are no checksums, since nothing carries the bytes.
    """

    has_checksums: ClassVar[bool] = False

    def make_plane(self) -> DataPlane:
        return SharedMemoryPlane()

    def reach(self, peer: Peer, welcome: Welcome) -> Source:
        memory = SharedMemory(welcome.memory, Memory(0, 0))  # nothing is copied
        return MappedSource(memory, welcome.num_bytes, self.config.device, is_shared=self.config.separate_processes)
