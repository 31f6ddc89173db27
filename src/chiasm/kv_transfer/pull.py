"""The base of connectors whose consumers pull: everything but the data plane.

The scheduler role collects what is to be done. The worker role hands it to the thread that does it: a :class:`LeaseServer` in
a producer, a :class:`Puller` in a consumer. A connector derives from :class:`PullConnector` and says which data plane moves
the bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from chiasm.errors import Code, ConfigurationError, KVUnavailableError
from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVClaim,
    KVConnector,
    KVConnectorMetadata,
    KVConnectorRole,
    KVLayout,
    KVLoad,
    KVRequestLike,
    KVSend,
    KVTransferConfig,
)
from chiasm.kv_transfer.lease_server import LeaseServer
from chiasm.kv_transfer.puller import Puller
from chiasm.transfer.memory import DataPlane, Memory, Peer, ReachedMemory
from chiasm.transfer.memory_file import MemoryFile
from chiasm.wire import KVTransferParams


class PullConnector(KVConnector):
    """Consumers read the producer's blocks without its help, under leases that they claim over the control channel."""

    def __init__(self, config: KVTransferConfig, role: KVConnectorRole) -> None:
        super().__init__(config, role)
        self._handshake: dict[str, str | int] = {}
        self._claimed: set[str] = set()
        self._noted = KVConnectorMetadata()
        self._lease_server: LeaseServer | None = None
        self._puller: Puller | None = None
        self._plane = self.make_plane() if role is KVConnectorRole.WORKER else None
        self._file: MemoryFile | None = None
        """Until it is offered."""
        self._memory: Memory | None = None
        """Consumer: what is written to."""

    @abstractmethod
    def make_plane(self) -> DataPlane:
        """Return the data plane. Called once, for the worker role. Raises ConfigurationError if it can't work here."""

    def shutdown(self) -> None:
        if self._lease_server is not None:
            self._lease_server.close()
        if self._puller is not None:
            self._puller.close()
        self._lease_server = self._puller = None
        self._memory = None
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- scheduler role ---------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[str, str | int]) -> None:
        self._handshake = dict(metadata)

    def claim(self, request: KVRequestLike) -> None:
        params = request.kv_transfer_params or KVTransferParams()
        if missing := params.missing():
            raise KVUnavailableError(
                f"The handle in kv_transfer_params lacks {', '.join(missing)}; send the one that prefill returned.",
                code=Code.KV_UNAVAILABLE,
            )
        if params.tp_size != 1:
            raise KVUnavailableError(
                f"The handle in kv_transfer_params is of a prefill instance that spreads its KV over {params.tp_size} ranks; "
                f"{self.config.connector} reads from one.",
                code=Code.KV_UNAVAILABLE,
            )
        self._claimed.add(request.request_id)
        self._noted.claims.append(KVClaim(request.request_id, params, request.num_choices, request.deadline))

    def update_state_after_alloc(self, request: KVRequestLike, index: int, blocks: Sequence[tuple[int, int]]) -> None:
        if request.request_id in self._claimed:
            local, remote = tuple(pair[0] for pair in blocks), tuple(pair[1] for pair in blocks)
            self._noted.loads.append(KVLoad(request.request_id, index, local, remote))

    def leave(self, request: KVRequestLike, block_ids: Sequence[int]) -> KVTransferParams:
        assert block_ids, "a prompt that is computed has blocks"
        self._noted.sends.append(KVSend(request.request_id, tuple(block_ids)))
        return KVTransferParams(
            do_remote_prefill=True,
            remote_engine_id=self.config.engine_id,
            remote_block_ids=list(block_ids),
            remote_host=str(self._handshake["host"]),
            remote_port=int(self._handshake["port"]),
            remote_request_id=request.request_id,
        )

    def give_back(self, request_id: str) -> None:
        self._noted.given_back.append(request_id)

    def drop(self, request: KVRequestLike) -> None:
        if request.request_id in self._claimed:
            self._claimed.remove(request.request_id)
            self._noted.dropped.append(request.request_id)

    def build_connector_meta(self) -> KVConnectorMetadata:
        noted, self._noted = self._noted, KVConnectorMetadata()
        return noted

    # ---- worker role ------------------------------------------------------------------------------------------------

    def allocate_kv_cache(self, num_bytes: int) -> torch.Tensor | None:
        assert self._plane is not None
        if not (self.is_producer and self._plane.needs_file):
            return None
        self._file = MemoryFile(num_bytes, "chiasm-kv")
        return torch.frombuffer(self._file.buffer, dtype=torch.uint8)

    def register_kv_caches(self, blocks: torch.Tensor, layout: KVLayout, wake: Callable[[], None]) -> None:
        if blocks.dtype is not torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != layout.bytes_per_block:
            raise ConfigurationError(f"The KV cache must be uint8 [blocks, {layout.bytes_per_block}].")
        if not blocks.is_contiguous():
            raise ConfigurationError("The KV cache must be contiguous.")
        assert self._plane is not None
        num_blocks = blocks.shape[0]
        if self.is_producer:
            memory = self._plane.offer(self._memory_of_producer(blocks))
            self._file = None
            try:
                self._lease_server = LeaseServer(self.config, layout, num_blocks, memory, self.stats, wake)
            except ConfigurationError:
                memory.close()
                raise
        else:
            self._memory = _memory_of(blocks)
            self._plane.prepare(self._memory)
            self._puller = Puller(self.config, layout, num_blocks, self._reach, self.stats, wake)

    def _memory_of_producer(self, blocks: torch.Tensor) -> Memory:
        assert self._plane is not None
        if not self._plane.needs_file:
            return _memory_of(blocks)
        file = self._file
        offset = -1 if file is None else blocks.data_ptr() - file.address
        if file is None or not 0 <= offset <= file.num_bytes - blocks.nbytes:
            raise ConfigurationError("The KV cache must lie in the memory that allocate_kv_cache returned.")
        return Memory.of_file(file, offset, blocks.nbytes)

    def _reach(self, peer: Peer, description: bytes) -> ReachedMemory:
        assert self._plane is not None
        assert self._memory is not None
        return self._plane.reach(peer, description, self._memory)

    def get_handshake_metadata(self) -> dict[str, str | int]:
        if self._lease_server is None:
            return {}
        return {"host": self.config.host, "port": self._lease_server.port}

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        if self._lease_server is not None and metadata.sends:
            self._lease_server.hold(metadata.sends)
        if self._lease_server is not None and metadata.given_back:
            self._lease_server.give_back(metadata.given_back)
        if self._puller is not None:
            self._puller.begin(metadata)

    def get_finished(self) -> FinishedTransfers:
        if self._puller is not None:
            return self._puller.take_finished()
        if self._lease_server is not None:
            return FinishedTransfers(sent=self._lease_server.take_sent())
        return FinishedTransfers()


def _memory_of(blocks: torch.Tensor) -> Memory:
    return Memory(blocks.data_ptr(), blocks.nbytes, str(blocks.device), blocks)
