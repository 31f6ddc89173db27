"""A holder and its readers in one process, for tests of data planes, and a stranger who says what a test wants."""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from chiasm.transfer import nixl, tcp
from chiasm.transfer.channel import Channel, ControlThread
from chiasm.transfer.greeting import Challenge, Terms
from chiasm.transfer.listener import Listener
from chiasm.transfer.memory import DataPlane, Memory, Peer, Range, ReachedMemory
from chiasm.transfer.memory_file import MemoryFile
from tests.transfer.raw_connection import RawConnection

PATIENCE_SECONDS = 30.0
NUM_BYTES = 32 << 20
TERMS = Terms("test", 1, {"model": "5eed"})


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """No connection and no read counts as broken because the machine is busy."""
    patch.setattr(tcp, "PATIENCE_SECONDS", PATIENCE_SECONDS)
    patch.setattr(nixl, "_PATIENCE_SECONDS", PATIENCE_SECONDS)


class Echo(msgspec.Struct, tag="echo", frozen=True):
    """What readers of these tests say, and hear in answer."""

    text: str = ""


ECHO: msgspec.msgpack.Decoder[Echo] = msgspec.msgpack.Decoder(Echo)


def content_of(name: object, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes that only this name has."""
    return np.random.default_rng(zlib.crc32(repr(name).encode())).integers(0, 256, num_bytes, np.uint8)


class Holder:
    """Offers memory, listens, and answers every message of a greeted reader with the same."""

    def __init__(
        self, plane: DataPlane, terms: Terms = TERMS, *, greeting_seconds: float = PATIENCE_SECONDS, shift: int = 0
    ) -> None:
        self.file = MemoryFile(NUM_BYTES + shift, "chiasm-test")
        self.bytes = np.frombuffer(self.file.buffer, np.uint8)[shift:]
        self.bytes[:] = content_of("holder", NUM_BYTES)
        self.offered = plane.offer(Memory.of_file(self.file, shift))
        self._listener = Listener(
            "127.0.0.1", 0, "E", terms, self.offered, ECHO, greeting_seconds=greeting_seconds, option="--test"
        )
        self.peer = Peer("127.0.0.1", self._listener.port)
        self.gone: list[int] = []
        self._is_closed = False
        self.control = ControlThread("test-holder", self._run)

    async def _run(self, closing: asyncio.Event) -> None:
        await self._listener.run(closing, self._serve, self.gone.append, is_read=asyncio.Event())

    async def _serve(self, reader: int, channel: Channel[Echo]) -> None:
        while True:
            channel.send(await channel.receive())

    def reach(self, plane: DataPlane, memory: Memory, reader: int = 7) -> ReachedMemory:
        """Reach the memory as a reader that may read all of it."""
        description = self.offered.describe(reader)
        self.offered.grant(reader, 0, [Range(0, NUM_BYTES)])
        return plane.reach(self.peer, description, memory)

    def close(self) -> None:
        """Idempotent."""
        self.control.close()
        if not self._is_closed:
            self._is_closed = True
            self.offered.close()


class Stranger(RawConnection):
    def __init__(self, peer: Peer) -> None:
        self.socket = socket.create_connection(peer, PATIENCE_SECONDS)

    def hear_challenge(self) -> Challenge:
        return msgspec.msgpack.decode(self.hear_frame(), type=Challenge)


@contextmanager
def stranger(peer: Peer) -> Iterator[Stranger]:
    connection = Stranger(peer)
    try:
        yield connection
    finally:
        connection.socket.close()
