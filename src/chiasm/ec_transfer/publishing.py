"""Publishing from a worker in another process than its scheduler, which has the holder: the worker writes to its memory.

The scheduler's process listens at a socket of the kernel, and takes the processes of its user, which are on its host. A worker
asks there for room, writes the entry to the memory, which it has mapped, and says that it is complete::

    worker -> scheduler    Reserve       scheduler -> worker    Room, or Published if it is there, or Refused
    (writes the entry)
    worker -> scheduler    Complete, or Abandon                 Published, or Refused

A worker that dies while it writes gives up its room. As long as it lives it keeps the connection while it writes, so nobody
writes to room that was given up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from chiasm.ec_transfer.entry_file import EntryHeader, header_of
from chiasm.ec_transfer.entry_memory import write_entry
from chiasm.ec_transfer.holder import Holder
from chiasm.ec_transfer.peer_messages import Bytes, Dimension
from chiasm.errors import StorageError
from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory_file import FileDescription, MappedFile
from chiasm.wire import UNREADABLE, Identifier

if TYPE_CHECKING:
    import torch

    from chiasm.transfer.arena import Piece

_logger = logging.getLogger(__name__)
_MAX_MESSAGE_BYTES = 1 << 12
_MAX_WORKERS = 16
ANSWER_SECONDS = 60.0
"""How long the scheduler's process may take to answer. It waits at most for another worker that writes the same entry."""
_PAUSE_SECONDS = 1.0
"""After a connection that failed, as one does if no descriptor is left."""
_CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` of Linux: process, user, group."""

_MessageT = TypeVar("_MessageT")


class PublishingAddress(msgspec.Struct, frozen=True):
    """Where a worker publishes. Plain data, which may be sent to another process."""

    socket: str
    memory: FileDescription
    has_checksums: bool


class Reserve(msgspec.Struct, tag="reserve", frozen=True):
    """Room for an entry; ``dtype`` is the name in safetensors."""

    identifier: Identifier
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[Dimension], msgspec.Meta(max_length=8)]


class Complete(msgspec.Struct, tag="complete", frozen=True):
    """The entry for which there was room is written."""

    checksum: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z", max_length=32)]


class Abandon(msgspec.Struct, tag="abandon", frozen=True):
    """It isn't, and won't be."""


class Room(msgspec.Struct, tag="room", frozen=True):
    """Write the entry at this offset of the memory."""

    offset: Bytes


class Published(msgspec.Struct, tag="published", frozen=True):
    """The entry is there."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The entry can't be published, for this reason, which is a sentence."""

    reason: str


_ToScheduler = Reserve | Complete | Abandon
_ToWorker = Room | Published | Refused
_FROM_WORKER: msgspec.msgpack.Decoder[_ToScheduler] = msgspec.msgpack.Decoder(_ToScheduler)
_FROM_SCHEDULER: msgspec.msgpack.Decoder[_ToWorker] = msgspec.msgpack.Decoder(_ToWorker)


class PublishingPort:
    """The scheduler's side: publishes in a holder what workers write."""

    def __init__(self, holder: Holder, fingerprint: str) -> None:
        self._holder = holder
        self._fingerprint = fingerprint
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"\0chiasm-ec-{secrets.token_hex(16)}"  # in no folder, so nothing is left behind
        self._listening.bind(name)
        self._listening.listen()
        self.address = PublishingAddress(name, holder.memory, holder.has_checksums)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._workers: dict[socket.socket, threading.Thread] = {}
        self._accepting = threading.Thread(target=self._accept, name="ec-publishing", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """End all connections. When this returns nothing more is published; idempotent."""
        with self._lock:
            self._closing.set()
            threads = [self._accepting, *self._workers.values()]
            for connection in (self._listening, *self._workers):
                with contextlib.suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if not self._closing.is_set():
                    _logger.error("No worker can connect to publish what it encodes: %s", error)
                    self._closing.wait(_PAUSE_SECONDS)
                continue
            with self._lock:
                if self._closing.is_set() or len(self._workers) == _MAX_WORKERS or _user_of(connection) != os.getuid():
                    connection.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(connection,), name="ec-publishing", daemon=True)
                self._workers[connection] = thread
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        writing: tuple[Piece, EntryHeader] | None = None
        try:
            while (message := _receive(connection, _FROM_WORKER)) is not None:
                answer, writing = self._answer(message, writing)
                connection.send(msgspec.msgpack.encode(answer))
        except (OSError, TransferError) as error:
            _logger.warning("The connection of a worker that publishes ended: %s", error)
        finally:
            if writing is not None:
                self._holder.abandon(writing[1])
            with self._lock:
                del self._workers[connection]
                connection.close()

    def _answer(
        self, message: _ToScheduler, writing: tuple[Piece, EntryHeader] | None
    ) -> tuple[_ToWorker, tuple[Piece, EntryHeader] | None]:
        """Return the answer, and the entry that is being written then. Raises TransferError for what makes no sense."""
        if isinstance(message, Reserve) == (writing is not None):
            raise TransferError("it asked for room twice, or for none before it wrote")
        if isinstance(message, Reserve):
            header = EntryHeader(message.identifier, self._fingerprint, message.dtype, tuple(message.shape))
            if not header.has_known_dtype:
                raise TransferError(f"it has elements of type {message.dtype!r}, which is not known here")
            try:
                piece = self._holder.reserve(header)
            except StorageError as error:
                return Refused(error.message), None
            return (Published(), None) if piece is None else (Room(piece.offset), (piece, header))
        assert writing is not None
        piece, header = writing
        if isinstance(message, Abandon):
            self._holder.abandon(header)
            return Refused("The entry was not written."), None
        self._holder.complete(piece, header._replace(checksum=message.checksum))
        return Published(), None


class Publisher:
    """The worker's side. It connects when there is something to publish, and again after a failure."""

    def __init__(self, address: PublishingAddress, fingerprint: str) -> None:
        self._address = address
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._memory: MappedFile | None = None

    def publish(self, identifier: str, tensor: torch.Tensor) -> None:
        """As ``Holder.publish``; also raises StorageError if the scheduler's process can't be reached. Any thread."""
        header = header_of(identifier, self._fingerprint, tensor)
        with self._lock:
            answer = self._ask(Reserve(identifier, header.dtype, list(header.shape)))
            if isinstance(answer, Room):
                try:
                    address = self._address_of(answer)
                    header = write_entry(address, header, tensor, with_checksum=self._address.has_checksums)
                except BaseException:
                    self._ask(Abandon())
                    raise
                answer = self._ask(Complete(header.checksum))
        if isinstance(answer, Refused):
            raise StorageError(answer.reason)

    def close(self) -> None:
        """End the connection. Called when nothing is written; idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _address_of(self, room: Room) -> int:
        if self._memory is None:
            try:
                self._memory = MappedFile(self._address.memory, is_written=True)
            except TransferError as error:
                raise _unreachable(error) from error
        return self._memory.address + room.offset

    def _ask(self, message: _ToScheduler) -> _ToWorker:
        try:
            if self._connection is None:
                self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._connection.settimeout(ANSWER_SECONDS)
                self._connection.connect(self._address.socket)
            self._connection.send(msgspec.msgpack.encode(message))
            answer = _receive(self._connection, _FROM_SCHEDULER)
            if answer is None:
                raise TransferError("it has closed the connection")
        except (OSError, TransferError) as error:
            self.close()  # an answer that is late would be taken for the next one
            raise _unreachable(error) from error
        return answer


def _receive(connection: socket.socket, decoder: msgspec.msgpack.Decoder[_MessageT]) -> _MessageT | None:
    """Wait for a message; None if the connection has ended. Raises OSError, and TransferError for what is no message."""
    packet = connection.recv(_MAX_MESSAGE_BYTES)
    if not packet:
        return None
    try:
        return decoder.decode(packet)
    except UNREADABLE as error:
        raise TransferError(f"what it said is not understood: {error}") from error


def _user_of(connection: socket.socket) -> int:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def _unreachable(reason: object) -> StorageError:
    return StorageError(f"The process that has the memory for embeddings can't be reached: {reason}.")
