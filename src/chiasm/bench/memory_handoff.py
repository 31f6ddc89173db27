"""Handoffs of embeddings from memory to memory, and what their transports take by themselves for the same bytes."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.bench.handed_over import WantingRequest, bytes_of, made_embedding, seconds_of, taken_in_step
from chiasm.bench.load import alternate
from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorRole, ECTransferConfig, ECTransferRole
from chiasm.transfer.memory import Memory, Peer, Run
from chiasm.transfer.memory_file import MemoryFile

if TYPE_CHECKING:
    import torch

_PAUSE_SECONDS = 0.05
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class MemoryHandoffResult:
    """Medians in seconds for an embedding of ``size_bytes``."""

    size_bytes: int
    memcpy_seconds: float
    bare_seconds: float
    """Of the transport: the memcpy, sendfile to recv_into, or a read by NIXL."""
    handoff_seconds: float


def measure_memory_handoff(connector: str, size_bytes: int, repeats: int) -> MemoryHandoffResult:
    """Measure handoffs over one of ``chiasm.ec_transfer.FROM_MEMORY`` between two halves of this process, on the CPU.

    A handoff begins with an embedding in the producer's memory and ends when the consumer's step has it. The consumer waits for
    it already, as when the proxy has told it the place. All memory was touched before. Everything that is measured begins after
    the same pause, in which the consumer says what it wants: what a core hasn't used for a while is slow to begin with.
    """
    embedding = made_embedding(size_bytes)
    source = bytes_of(embedding)
    target = np.zeros_like(source)
    with _Pair(connector, source.nbytes) as pair, _bare(connector, source.nbytes) as bare:
        memcpy, alone, handoff = alternate(
            [
                lambda: (_seconds_after_pause(lambda: np.copyto(target, source)),),
                lambda: (_seconds_after_pause(bare.move),),
                lambda: (pair.hand_off(embedding),),
            ],
            repeats,
        )
    is_memcpy = connector == "SharedMemoryConnector"
    return MemoryHandoffResult(source.nbytes, memcpy, memcpy if is_memcpy else alone, handoff)


def _seconds_after_pause(action: Callable[[], object]) -> float:
    time.sleep(_PAUSE_SECONDS)
    return seconds_of(action)


class _Pair:
    """A producer and a consumer, each with both halves."""

    def __init__(self, connector: str, size_bytes: int) -> None:
        room = 4 * (size_bytes + (1 << 20))
        self._producer = _halves(connector, ECTransferRole.PRODUCER, room)
        self._consumer = _halves(connector, ECTransferRole.CONSUMER, room)
        self._woken = threading.Event()
        self._consumer[0].set_wake(self._wake)

    def _wake(self, arrived: str = "", /) -> None:
        self._woken.set()

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for half in (*self._consumer, *self._producer):
            half.shutdown()

    def hand_off(self, embedding: torch.Tensor) -> float:
        """Return the seconds from publishing until a step has the embedding."""
        identifier = secrets.token_hex(32)
        (scheduler, worker), place = self._consumer, self._producer[1].place()
        assert place is not None
        request = WantingRequest.of(identifier, embedding)
        scheduler.ensure_cache_available(request, 0)
        scheduler.expect({identifier: place})
        time.sleep(_PAUSE_SECONDS)
        started = time.perf_counter()
        self._producer[1].save_caches({identifier: embedding}, identifier)
        while not scheduler.has_cache_item(identifier):
            if not self._woken.wait(_PATIENCE_SECONDS):
                raise TimeoutError("an embedding did not arrive")
            self._woken.clear()
        scheduler.update_state_after_alloc(request, 0)
        received = taken_in_step(scheduler, worker)
        seconds = time.perf_counter() - started
        received.clear()
        scheduler.request_finished(request)
        return seconds


def _halves(connector: str, role: ECTransferRole, room: int) -> tuple[ECConnector, ECConnector]:
    config = ECTransferConfig(connector=connector, role=role, max_bytes=room, receive_bytes=room)
    scheduler = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
    worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
    scheduler.meet(worker)
    worker.meet(scheduler)
    return scheduler, worker


class _Bare:
    """What moves the same bytes without anything around it; by itself nothing."""

    def __enter__(self) -> _Bare:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def move(self) -> None:
        return None


class _BareTcp(_Bare):
    """``sendfile`` from a memory file to ``recv_into`` in memory that was touched, over loopback."""

    def __init__(self, size_bytes: int) -> None:
        self._file = MemoryFile(size_bytes, "chiasm-bench")
        self._file.buffer[:] = bytes(size_bytes)
        self._target = bytearray(size_bytes)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._sender = socket.create_connection(listener.getsockname())
            self._receiver = listener.accept()[0]
        for one in (self._sender, self._receiver):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self) -> None:
        sending = threading.Thread(target=self._send)
        sending.start()
        left = memoryview(self._target)
        while left:
            left = left[self._receiver.recv_into(left) :]
        sending.join()

    def _send(self) -> None:
        done = 0
        while done < len(self._target):
            done += os.sendfile(self._sender.fileno(), self._file.descriptor, done, len(self._target) - done)

    def __exit__(self, *_: object) -> None:
        self._sender.close()
        self._receiver.close()
        self._file.close()


class _BareNixl(_Bare):
    """One read of the data plane, with a thread that drives the other side as a holder's does."""

    def __init__(self, size_bytes: int) -> None:
        from chiasm.transfer.nixl import NixlPlane

        self._size = size_bytes
        files = MemoryFile(size_bytes, "chiasm-bench"), MemoryFile(size_bytes, "chiasm-bench")
        for file in files:
            file.buffer[:] = bytes(size_bytes)
        plane = NixlPlane(f"bench-{secrets.token_hex(8)}")
        self._offered = plane.offer(Memory.of_file(files[0]))
        self._reached = plane.reach(Peer("127.0.0.1", 0), self._offered.describe(1), Memory.of_file(files[1]))
        self._over = threading.Event()
        self._driving = threading.Thread(target=self._drive)
        self._driving.start()

    def move(self) -> None:
        self._reached.read([Run(0, 0, self._size)], lambda: False)

    def _drive(self) -> None:
        while not self._over.wait(self._offered.progress_seconds):
            self._offered.progress()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._driving.join()
        self._reached.close()
        self._offered.close()


def _bare(connector: str, size_bytes: int) -> _Bare:
    kinds: dict[str, Callable[[int], _Bare]] = {"TcpConnector": _BareTcp, "NixlConnector": _BareNixl}
    return kinds[connector](size_bytes) if connector in kinds else _Bare()
