"""The data plane for any hosts, over TCP and without a library: from the holder's memory file into the reader's memory.

A reader opens data connections at the port of the control channel. It attaches each to itself: the holder sends a nonce, as it
does to everybody, and the reader proves with it that it has the *ticket*, which the holder has given to this reader alone, over
the control channel. A proof counts on one connection, and a ticket as long as its reader is connected. Then the reader sends
requests, and the bytes come in their order. Every reader gets a connection, and more of them if there are few readers::

    reader -> holder    number of ranges, and offset and size of each
    holder -> reader    0 and all bytes, or 1 if one of the ranges is not granted to the reader; that ends the connection

The holder sends with ``sendfile``, on one thread for each connection; the reader receives straight to where the bytes belong.
Both let go of the GIL once for several megabytes, so neither is slowed down much by what else their processes do.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import hmac
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from chiasm.http.vanished import break_if_vanished
from chiasm.transfer.channel import LENGTH, MAX_FRAME_BYTES, VANISHED_SECONDS
from chiasm.transfer.errors import TransferError
from chiasm.transfer.greeting import Attach, Challenge
from chiasm.transfer.memory import (
    DataPlane,
    Memory,
    OfferedMemory,
    Peer,
    Range,
    ReachedMemory,
    Run,
    batches_of,
    check_host_memory,
    check_remote,
    read_description,
)
from chiasm.wire import UNREADABLE

_logger = logging.getLogger(__name__)

MAX_FURTHER_CONNECTIONS = 256
"""Data connections that a holder serves besides the first one of each reader, each on a thread: so every reader can read,
however many there are."""
MAX_PARALLEL_READS = 8
"""Data connections that a reader has to one holder, if the holder takes so many. Further reads wait for one."""
MAX_CONNECTIONS_OF_A_READER = 4 * MAX_PARALLEL_READS
"""What a holder allows: it may learn late of those that the reader has closed."""
MAX_RANGES = 1 << 12
"""In one request; a reader that needs more asks again."""
PATIENCE_SECONDS = 5.0
"""How long nothing may move in the middle of a request before a connection counts as broken."""
_BYTES_AT_A_TIME = 4 << 20
"""What is received before it is asked whether to stop, and used meanwhile: the kernel receives what comes next."""
_BUFFERS_AT_A_TIME = 1 << 10  # IOV_MAX
_WAKING_BYTES = 1 << 18
"""How many bytes wake a reader. Otherwise it would wake for every few hundred kilobytes, and interrupt a step each time."""
_TICKET_BYTES = 32
_COUNT = struct.Struct(">I")
_RANGE = struct.Struct(">QQ")
_GRANTED, _REFUSED = b"\0", b"\1"
_BEGUN, _FULL = b"\2", b"\3"
"""What the holder says when a connection is attached, and when it takes no further one of this reader."""
_PAUSE_SECONDS = 0.1
"""After a connection was not taken although the reader has no other: the holder will learn that its last one has ended."""
_TIMEVAL = struct.Struct("@ll")


class _Description(msgspec.Struct, frozen=True):
    """What one reader needs: its number, its ticket, and how much memory there is."""

    reader: int
    ticket: bytes
    num_bytes: int


class TcpPlane(DataPlane):
    """Moves bytes in host memory between processes of any hosts. What a reader wasn't granted, it can't read."""

    needs_file = True

    def __init__(self, device: str = "cpu") -> None:
        """``device`` is where the memory is that will be offered or written to."""
        check_host_memory(device, "TCP")

    def offer(self, memory: Memory) -> OfferedMemory:
        return _OfferedOverTcp(memory)

    def reach(self, peer: Peer, description: bytes, memory: Memory) -> ReachedMemory:
        return _ReachedOverTcp(peer, read_description(description, _Description), memory)


# ---- the holder -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Reader:
    ticket: bytes = field(default_factory=lambda: secrets.token_bytes(_TICKET_BYTES))
    claims: dict[int, list[Range]] = field(default_factory=dict)
    """What was granted as each claim: ranges in ascending order that don't overlap."""
    connections: set[socket.socket] = field(default_factory=set)

    def may_read(self, wanted: Range) -> bool:
        for ranges in self.claims.values():
            index = bisect.bisect(ranges, wanted.offset, key=lambda granted: granted.offset) - 1
            if index >= 0 and sum(wanted) <= sum(ranges[index]):
                return True
        return False


class _OfferedOverTcp(OfferedMemory):
    def __init__(self, memory: Memory) -> None:
        assert memory.file is not None
        self._memory = memory
        self._file = memory.file
        self._lock = threading.Lock()  # guards the readers
        self._readers: dict[int, _Reader] = {}
        self._threads: set[threading.Thread] = set()

    def describe(self, reader: int) -> bytes:
        with self._lock:
            known = self._readers.setdefault(reader, _Reader())
        return msgspec.msgpack.encode(_Description(reader, known.ticket, self._memory.num_bytes))

    def grant(self, reader: int, claim: int, ranges: Iterable[Range]) -> None:
        with self._lock:
            if reader in self._readers:
                self._readers[reader].claims[claim] = sorted(ranges)

    def withdraw(self, reader: int, claim: int) -> None:
        with self._lock:
            if reader in self._readers:
                self._readers[reader].claims.pop(claim, None)

    def dismiss(self, reader: int) -> None:
        with self._lock:
            gone = self._readers.pop(reader, None)
            for connection in gone.connections if gone is not None else ():
                _end(connection)

    def attach(self, reader: int, nonce: bytes, proof: bytes, connection: socket.socket) -> bool:
        with self._lock:
            known = self._readers.get(reader)
            if known is None or not hmac.compare_digest(proof, _proof_of(known.ticket, nonce)):
                return False
            if known.connections and not self._takes_further(known):
                with contextlib.suppress(OSError):
                    connection.send(_FULL)
                return False
            thread = threading.Thread(target=self._serve, args=(known, connection), name="transfer-send", daemon=True)
            known.connections.add(connection)
            self._threads.add(thread)
        thread.start()
        return True

    def close(self) -> None:
        with self._lock:
            readers, self._readers = list(self._readers.values()), {}
            for reader in readers:
                for connection in reader.connections:
                    _end(connection)
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._file.close()

    def _takes_further(self, reader: _Reader) -> bool:
        """Return whether a reader that has a connection may have one more."""
        further = sum(len(known.connections) - 1 for known in self._readers.values() if known.connections)
        return len(reader.connections) < MAX_CONNECTIONS_OF_A_READER and further < MAX_FURTHER_CONNECTIONS

    def _serve(self, reader: _Reader, connection: socket.socket) -> None:
        """Answer the requests of one data connection until it ends."""
        try:
            _configure(connection)
            connection.sendall(_BEGUN)
            while True:
                ranges = _receive_request(connection)
                with self._lock:
                    is_granted = all(map(reader.may_read, ranges))
                if not is_granted:
                    connection.sendall(_REFUSED)
                    raise TransferError("a range was asked for that was not granted")
                connection.sendall(_GRANTED, socket.MSG_MORE)
                for wanted in ranges:
                    self._send(connection, wanted)
        except (OSError, TransferError) as error:
            _logger.debug("A data connection ended: %s.", error)
        finally:
            with self._lock:
                reader.connections.discard(connection)
                self._threads.discard(threading.current_thread())
                connection.close()

    def _send(self, connection: socket.socket, wanted: Range) -> None:
        offset, left = self._memory.file_offset + wanted.offset, wanted.num_bytes
        while left:
            sent = os.sendfile(connection.fileno(), self._file.descriptor, offset, left)
            if not sent:
                raise TransferError("the memory ended")
            offset += sent
            left -= sent


def _receive_request(connection: socket.socket) -> list[Range]:
    """Wait for a request as long as it takes, but not for its rest. Raises TransferError if it is none."""
    while True:
        try:
            first = connection.recv(1)
            break
        except BlockingIOError:  # nothing for a while
            continue
    if not first:
        raise _closed()
    (count,) = _COUNT.unpack(first + _receive_exactly(connection, _COUNT.size - 1))
    if not 0 < count <= MAX_RANGES:
        raise TransferError(f"a request of {count} ranges came")
    packed = _receive_exactly(connection, count * _RANGE.size)
    return [Range(*pair) for pair in _RANGE.iter_unpack(packed)]


# ---- the reader -------------------------------------------------------------------------------------------------------


class _TakesNoFurther(Exception):
    """The holder has too many data connections for a further one of this reader."""


class _ReachedOverTcp(ReachedMemory):
    def __init__(self, peer: Peer, description: _Description, memory: Memory) -> None:
        self._peer = peer
        self._description = description
        self._memory = memory
        self._buffer = memoryview((ctypes.c_char * memory.num_bytes).from_address(memory.address)).cast("B")
        self._given_back = threading.Condition()  # guards what follows
        self._idle: list[socket.socket] = []
        self._num_used = 0
        self._is_closed = False
        self._give_back(self._take(), True)
        self._turns = threading.Semaphore(MAX_PARALLEL_READS)

    def read(
        self, runs: Sequence[Run], stop: Callable[[], bool], received: Callable[[int], None] = lambda num_bytes: None
    ) -> bool:
        for run in runs:
            check_remote(run, self._description.num_bytes)
        with self._turns:
            connection = self._take()
            is_whole = False
            try:
                is_whole = all(
                    self._read(connection, runs[begin : begin + MAX_RANGES], stop, received)
                    for begin in range(0, len(runs), MAX_RANGES)
                )
            except BlockingIOError:
                raise TransferError(f"none of its bytes came for {PATIENCE_SECONDS:g} seconds") from None
            except OSError as error:
                raise TransferError(f"the data connection broke: {error}") from error
            finally:
                self._give_back(connection, is_whole)
        return is_whole

    def close(self) -> None:
        with self._given_back:
            self._is_closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _read(
        self,
        connection: socket.socket,
        runs: Sequence[Run],
        stop: Callable[[], bool],
        received: Callable[[int], None],
    ) -> bool:
        """Ask for some runs, and receive them. Return whether all of them are here."""
        if stop():
            return False
        request = [_COUNT.pack(len(runs)), *(_RANGE.pack(run.remote, run.num_bytes) for run in runs)]
        connection.sendall(b"".join(request))
        if _receive_exactly(connection, 1) != _GRANTED:
            return False
        left = sum(run.num_bytes for run in runs)
        for batch in batches_of(runs, max_bytes=_BYTES_AT_A_TIME, max_runs=_BUFFERS_AT_A_TIME):
            targets = [self._buffer[run.local : run.local + run.num_bytes] for run in batch]
            # Only as many as follow these, or the last of these might wake nobody.
            left -= sum(map(len, targets))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(left, _WAKING_BYTES)))
            while targets:
                count = connection.recvmsg_into(targets, 0, socket.MSG_WAITALL)[0]
                if not count:
                    raise _closed()
                received(count)
                _advance(targets, count)
                if stop():
                    return False
        return True

    def _take(self) -> socket.socket:
        """Return an idle connection or a new one. If the holder takes no further one, wait for one of those that are used."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            with self._given_back:
                if self._idle:
                    self._num_used += 1
                    return self._idle.pop()
            try:
                connection = self._connect()
            except _TakesNoFurther:
                with self._given_back:
                    if not self._num_used and time.monotonic() > give_up:
                        raise TransferError("it takes no data connection, since it has too many") from None
                    if not self._idle:
                        self._given_back.wait(None if self._num_used else _PAUSE_SECONDS)
            else:
                with self._given_back:
                    self._num_used += 1
                return connection

    def _give_back(self, connection: socket.socket, is_idle: bool) -> None:
        """Keep a connection for the next read. One in the middle of an answer is closed."""
        with self._given_back:
            self._num_used -= 1
            self._given_back.notify_all()
            if is_idle and not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> socket.socket:
        try:
            connection = socket.create_connection(self._peer, PATIENCE_SECONDS)
            try:
                self._attach(connection)
            except BaseException:
                connection.close()
                raise
        except (OSError, ValueError) as error:
            raise TransferError(f"no data connection to it can be opened: {error}") from error
        return connection

    def _attach(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        _configure(connection)
        (length,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise TransferError("its data connection does not begin with a challenge")
        try:
            challenge = msgspec.msgpack.decode(_receive_exactly(connection, length), type=Challenge)
        except UNREADABLE as error:
            raise TransferError(f"its data connection does not begin with a challenge: {error}") from error
        proof = _proof_of(self._description.ticket, challenge.nonce)
        body = msgspec.msgpack.encode(Attach(self._description.reader, proof))
        connection.sendall(LENGTH.pack(len(body)) + body)
        answer = _receive_exactly(connection, 1)
        if answer == _FULL:
            raise _TakesNoFurther
        if answer != _BEGUN:
            raise TransferError("it does not take the data connection")


def _advance(targets: list[memoryview], count: int) -> None:
    """Remove the first ``count`` bytes, which have been filled."""
    filled = 0
    for target in targets:
        if count < len(target):
            break
        count -= len(target)
        filled += 1
    del targets[:filled]
    if count:
        targets[0] = targets[0][count:]


# ---- both -------------------------------------------------------------------------------------------------------------


def _proof_of(ticket: bytes, nonce: bytes) -> bytes:
    return hmac.digest(ticket, b"chiasm data connection" + nonce, "sha256")


def _configure(connection: socket.socket) -> None:
    """Let blocking calls end when nothing moves for a while, without Python's own timeouts, which split each call into many."""
    connection.setblocking(True)
    break_if_vanished(connection, VANISHED_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    timeout = _TIMEVAL.pack(int(PATIENCE_SECONDS), int(PATIENCE_SECONDS % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Raises OSError if the connection ends, or if nothing came for PATIENCE_SECONDS."""
    received = b""
    while len(received) < count:
        more = connection.recv(count - len(received), socket.MSG_WAITALL)
        if not more:
            raise _closed()
        received += more
    return received


def _closed() -> OSError:
    return ConnectionResetError("the other side closed it")


def _end(connection: socket.socket) -> None:
    """Wake whoever uses the connection; the thread that does closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
