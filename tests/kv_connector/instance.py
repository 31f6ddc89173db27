"""A stand-in for an engine: it calls both halves of a connector in the order in which an engine does."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.kv_transfer import (
    FinishedTransfers,
    KVConnectorFactory,
    KVConnectorRole,
    KVLayout,
    KVTransferConfig,
    KVTransferRole,
)
from chiasm.wire import KVTransferParams

LAYOUT = KVLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=64, dtype="float32", bytes_per_block=32768)
NUM_BLOCKS = 64
PATIENCE_SECONDS = 30.0
"""Before a test gives up; nothing that works takes that long."""


@dataclass(frozen=True)
class Request:
    """What an engine's request shows to a connector."""

    request_id: str
    kv_transfer_params: KVTransferParams | None = None
    num_choices: int = 1
    deadline: float = float("inf")


def config_for(connector: str, role: KVTransferRole, **changes: Any) -> KVTransferConfig:
    settings: dict[str, Any] = {"connector": connector, "role": role, "fingerprint": "5eed"}
    settings |= {"connect_timeout_seconds": PATIENCE_SECONDS} | changes  # nobody is lost because the machine is busy
    settings.setdefault("engine_id", "P" if role is KVTransferRole.PRODUCER else "D")
    return KVTransferConfig(**settings)


def content_of(name: object, num_bytes: int = LAYOUT.bytes_per_block) -> torch.Tensor:
    """Bytes that only this name has."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


class Instance:
    """One instance of one role: both halves of its connector, its KV cache, and what the connector has reported."""

    def __init__(self, config: KVTransferConfig, layout: KVLayout = LAYOUT, num_blocks: int = NUM_BLOCKS) -> None:
        self.config = config
        self.layout = layout
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER)
        self.scheduler = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
        num_bytes = num_blocks * layout.bytes_per_block
        memory = self.worker.allocate_kv_cache(num_bytes)
        if memory is None:
            memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.blocks = memory.view(num_blocks, layout.bytes_per_block)
        self.seen = FinishedTransfers()
        self._news = threading.Event()
        try:
            self.worker.register_kv_caches(self.blocks, layout, self._news.set)
        except BaseException:
            self.shutdown()
            raise
        self.scheduler.set_xfer_handshake_metadata(self.worker.get_handshake_metadata())

    def shutdown(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()

    def step(self) -> None:
        """What an engine does between two steps of the model."""
        metadata = self.scheduler.build_connector_meta()
        if metadata:
            self.worker.start_load_kv(metadata)
        finished = self.worker.get_finished()
        self.seen.sent |= finished.sent
        self.seen.loaded |= finished.loaded
        self.seen.broken_off |= finished.broken_off
        assert not self.seen.failed.keys() & finished.failed.keys(), "a failure is told once"
        self.seen.failed |= finished.failed

    def wait_for(self, condition: Callable[[FinishedTransfers], object]) -> None:
        """Step, whenever the connector wakes the engine, until what it has reported satisfies ``condition``."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            self._news.clear()
            self.step()
            if condition(self.seen):
                return
            if not self._news.wait(give_up - time.monotonic()):
                raise TimeoutError(f"nothing came in {PATIENCE_SECONDS} seconds; so far {self.seen}")

    # ---- as a producer ----------------------------------------------------------------------------------------------

    def prefill(self, request_id: str, block_ids: Sequence[int]) -> KVTransferParams:
        """Fill the blocks with content that only this request has, and leave them."""
        for place, block in enumerate(block_ids):
            self.blocks[block] = content_of((request_id, place), self.layout.bytes_per_block)
        handle = self.scheduler.leave(Request(request_id), block_ids)
        self.step()
        handle.num_tokens = len(block_ids) * self.layout.block_size
        return handle

    # ---- as a consumer ----------------------------------------------------------------------------------------------

    def arrive(
        self, request_id: str, handle: KVTransferParams, num_choices: int = 1, deadline: float = float("inf")
    ) -> Request:
        """A request comes with a handle."""
        request = Request(request_id, handle, num_choices, deadline)
        self.scheduler.claim(request)
        return request

    def load(self, request: Request, local: Sequence[int], remote: Sequence[int] | None = None, index: int = 0) -> None:
        """There is room for the request: load its blocks into ``local``."""
        handle = request.kv_transfer_params
        assert handle is not None
        remote = handle.remote_block_ids or () if remote is None else remote
        self.scheduler.update_state_after_alloc(request, index, list(zip(local, remote, strict=True)))

    def drop(self, request: Request) -> None:
        self.scheduler.drop(request)

    def fetch(self, request_id: str, handle: KVTransferParams, local: Sequence[int]) -> None:
        """Do all that a request does until its blocks are here. Raises AssertionError with the reason if it fails."""
        request = self.arrive(request_id, handle)
        self.load(request, local)
        self.wait_for(lambda seen: (request_id, 0) in seen.loaded or request_id in seen.failed)
        assert request_id not in self.seen.failed, self.seen.failed[request_id]
        self.drop(request)

    def failure_of(self, request: Request) -> str:
        """Wait until the request has failed, and return why."""
        self.wait_for(lambda seen: request.request_id in seen.failed)
        self.drop(request)
        return self.seen.failed[request.request_id]

    def holds(self, request_id: str, local: Sequence[int]) -> bool:
        """Whether ``local`` are the request's blocks, byte for byte."""
        return all(
            torch.equal(self.blocks[block], content_of((request_id, place), self.layout.bytes_per_block))
            for place, block in enumerate(local)
        )
