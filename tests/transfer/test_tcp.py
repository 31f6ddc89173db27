"""What a holder gives to whom over TCP, and what either side does with one that misbehaves."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch.ports import HeldPort
from chiasm.transfer import listener, tcp
from chiasm.transfer.channel import MAX_FRAME_BYTES
from chiasm.transfer.errors import TransferError
from chiasm.transfer.greeting import Attach, Challenge
from chiasm.transfer.memory import Memory, Peer, Range, ReachedMemory, Run
from chiasm.transfer.tcp import TcpPlane

from .holder import NUM_BYTES, Holder, Stranger, stranger

SIZE = 1 << 20


def never() -> bool:
    return False


@pytest.fixture
def holder() -> Iterator[Holder]:
    holder = Holder(TcpPlane())
    yield holder
    holder.close()


@pytest.fixture
def target() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full(NUM_BYTES, 7, np.uint8)


@pytest.fixture
def memory(target: np.ndarray[Any, np.dtype[np.uint8]]) -> Memory:
    return Memory(target.ctypes.data, NUM_BYTES, owner=target)


@pytest.fixture
def reached(holder: Holder, memory: Memory) -> Iterator[ReachedMemory]:
    """As reader 7, to whom nothing has been granted."""
    reached = TcpPlane().reach(holder.peer, holder.offered.describe(7), memory)
    yield reached
    reached.close()


def changed(description: bytes, change: dict[str, object]) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(description) | change)


def attach(connection: Stranger, holder: Holder, reader: int = 7) -> None:
    """Do what a reader does until its data connection is taken."""
    ticket = msgspec.msgpack.decode(holder.offered.describe(reader))["ticket"]
    connection.say(Attach(reader, tcp._proof_of(ticket, connection.hear_challenge().nonce)))
    assert connection.exactly(1) == b"\2"


def test_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="use NixlConnector"):
        TcpPlane("cuda:0")


def test_what_was_not_granted_is_not_read(
    holder: Holder, reached: ReachedMemory, target: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    holder.offered.grant(7, 1, [Range(1000, 100), Range(5000, 10)])
    holder.offered.grant(8, 1, [Range(2000, 100)])
    for offset, size in ((999, 2), (1000, 101), (1099, 2), (2000, 1), (4999, 1), (5009, 2), (0, NUM_BYTES)):
        assert not reached.read([Run(0, offset, size)], never)
        assert not reached.read([Run(500, 1000, 5), Run(0, offset, size)], never)
    assert (target == 7).all()
    assert reached.read([Run(0, 1000, 100), Run(100, 5009, 1)], never)


def test_what_was_withdrawn_is_not_read(holder: Holder, reached: ReachedMemory) -> None:
    holder.offered.grant(7, 1, [Range(0, 100)])
    holder.offered.grant(7, 2, [Range(50, 100)])
    assert reached.read([Run(0, 50, 50)], never)
    holder.offered.withdraw(7, 1)
    assert not reached.read([Run(0, 0, 100)], never)
    assert reached.read([Run(0, 50, 100)], never)
    holder.offered.withdraw(7, 2)
    assert not reached.read([Run(0, 50, 1)], never)


@pytest.mark.parametrize("change", [{"ticket": bytes(32)}, {"ticket": b""}, {"reader": 8}])
def test_a_wrong_ticket_opens_nothing(holder: Holder, memory: Memory, change: dict[str, object]) -> None:
    holder.offered.describe(8)
    with pytest.raises(TransferError, match="data connection"):
        TcpPlane().reach(holder.peer, changed(holder.offered.describe(7), change), memory)


def test_a_proof_opens_one_connection(holder: Holder) -> None:
    ticket = msgspec.msgpack.decode(holder.offered.describe(7))["ticket"]
    with stranger(holder.peer) as first, stranger(holder.peer) as second:
        recorded = Attach(7, tcp._proof_of(ticket, first.hear_challenge().nonce))
        first.say(recorded)
        assert first.exactly(1) == b"\2"
        second.hear_challenge()
        second.say(recorded)
        assert second.is_closed()


def test_the_connections_of_a_reader_that_has_gone_end(holder: Holder, reached: ReachedMemory, memory: Memory) -> None:
    holder.offered.grant(7, 1, [Range(0, 100)])
    description = holder.offered.describe(7)
    assert reached.read([Run(0, 0, 100)], never)
    holder.offered.dismiss(7)
    with pytest.raises(TransferError):
        reached.read([Run(0, 0, 100)], never)
    with pytest.raises(TransferError):
        TcpPlane().reach(holder.peer, description, memory)


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack(">I", 0),
        struct.pack(">I", tcp.MAX_RANGES + 1),
        struct.pack(">I", (1 << 32) - 1),
        struct.pack(">IQQ", 1, 0, (1 << 64) - 1),
        struct.pack(">IQQ", 1, 1 << 63, 1 << 63),
        struct.pack(">IQQ", 1, (1 << 64) - 1, 2),
        b"GET / HTTP/1.1\r\n\r\n" + b"x" * 70_000,
    ],
    ids=range(7),
)
def test_a_hostile_request_ends_its_connection_and_no_other(
    holder: Holder, reached: ReachedMemory, request_bytes: bytes
) -> None:
    holder.offered.grant(7, 1, [Range(0, SIZE)])
    with stranger(holder.peer) as hostile:
        attach(hostile, holder)
        with contextlib.suppress(ConnectionError):  # a long one may be cut off before all of it is sent
            hostile.socket.sendall(request_bytes)
            assert hostile.socket.recv(1) in {b"\1", b""}
        assert hostile.is_closed()
    assert reached.read([Run(0, 0, SIZE)], never)


def test_the_connections_of_a_reader_are_bounded(holder: Holder) -> None:
    opened = [Stranger(holder.peer) for _ in range(tcp.MAX_CONNECTIONS_OF_A_READER)]
    for connection in opened:
        attach(connection, holder)
    with stranger(holder.peer) as further, stranger(holder.peer) as other:
        ticket = msgspec.msgpack.decode(holder.offered.describe(7))["ticket"]
        further.say(Attach(7, tcp._proof_of(ticket, further.hear_challenge().nonce)))
        assert further.exactly(1) == b"\3"
        assert further.is_closed()
        attach(other, holder, reader=8)
    for connection in opened:
        connection.socket.close()


def test_every_reader_has_a_connection_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, memory: Memory
) -> None:
    monkeypatch.setattr(tcp, "MAX_FURTHER_CONNECTIONS", 0)
    reached = [holder.reach(TcpPlane(), memory, reader) for reader in range(20)]
    assert all(one.read([Run(0, 0, 1000)], never) for one in reached for _ in range(2))
    for one in reached:
        one.close()


@pytest.mark.parametrize("further", [0, 1])
def test_reads_share_the_connections_that_the_holder_takes(
    monkeypatch: pytest.MonkeyPatch,
    holder: Holder,
    memory: Memory,
    target: np.ndarray[Any, np.dtype[np.uint8]],
    further: int,
) -> None:
    monkeypatch.setattr(tcp, "MAX_FURTHER_CONNECTIONS", further)
    reached = holder.reach(TcpPlane(), memory)
    with ThreadPoolExecutor(tcp.MAX_PARALLEL_READS) as pool:
        runs = [Run(n * 1000, n * 1000, 1000) for n in range(100)]
        assert all(pool.map(lambda run: reached.read([run], never), runs))
    assert np.array_equal(target[:100_000], holder.bytes[:100_000])
    reached.close()


def test_a_reader_whose_only_connection_broke_gets_another_one_when_the_holder_has_learnt_of_it(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, memory: Memory
) -> None:
    monkeypatch.setattr(tcp, "MAX_FURTHER_CONNECTIONS", 0)
    reached = holder.reach(TcpPlane(), memory)
    assert isinstance(reached, tcp._ReachedOverTcp)
    broken = reached._take()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reached.read, [Run(0, 0, 1000)], never)
        reached._give_back(broken, False)
        assert reading.result()
    reached.close()


def test_a_holder_that_takes_no_connection_for_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, memory: Memory
) -> None:
    monkeypatch.setattr(tcp, "MAX_FURTHER_CONNECTIONS", 0)
    with stranger(holder.peer) as other:
        attach(other, holder)
        monkeypatch.setattr(tcp, "PATIENCE_SECONDS", 1.0)
        with pytest.raises(TransferError, match="takes no data connection, since it has too many"):
            holder.reach(TcpPlane(), memory)


def test_readers_that_connect_while_the_holder_stands_still_are_all_taken(holder: Holder) -> None:
    connected = threading.Event()
    holder.control.call(connected.wait)
    connections = [Stranger(holder.peer) for _ in range(200)]
    connected.set()
    for reader, connection in enumerate(connections):
        attach(connection, holder, reader)
        connection.socket.close()


def test_a_flood_of_strangers_keeps_no_reader_out(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, memory: Memory
) -> None:
    monkeypatch.setattr(listener, "MAX_STRANGERS", 64)
    flood = [Stranger(holder.peer) for _ in range(3 * listener.MAX_STRANGERS)]
    holder.offered.grant(7, 1, [Range(0, 100)])
    reached = holder.reach(TcpPlane(), memory)
    assert reached.read([Run(0, 0, 100)], never)
    reached.close()
    for connection in flood:
        connection.socket.close()


@pytest.mark.parametrize("beyond", [0, 1, tcp._WAKING_BYTES - 1, tcp._WAKING_BYTES, tcp._WAKING_BYTES + 1])
def test_the_last_bytes_of_any_size_wake_their_reader(
    holder: Holder, memory: Memory, target: np.ndarray[Any, np.dtype[np.uint8]], beyond: int
) -> None:
    reached = holder.reach(TcpPlane(), memory)
    size = tcp._BYTES_AT_A_TIME + beyond
    for begin in range(3):  # later ones over the same connection
        assert reached.read([Run(begin, begin, size)], never)
        assert np.array_equal(target[begin : begin + size], holder.bytes[begin : begin + size])
    reached.close()


def test_more_reads_than_connections_wait_for_their_turn(
    holder: Holder, memory: Memory, target: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    reached = holder.reach(TcpPlane(), memory)
    with ThreadPoolExecutor(4 * tcp.MAX_PARALLEL_READS) as pool:
        runs = [Run(n * 1000, n * 1000, 1000) for n in range(1000)]
        assert all(pool.map(lambda run: reached.read([run], never), runs))
    assert np.array_equal(target[:1_000_000], holder.bytes[:1_000_000])
    reached.close()


class Liar:
    """A holder's port at which a test says what it wants."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.peer = Peer("127.0.0.1", self._listener.getsockname()[1])
        self._pool = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._listener.close()
        self._pool.shutdown()

    def answer(self, *parts: bytes, stays: bool = True) -> None:
        """Take a connection, send the first part, and each further one when something has come."""
        self._pool.submit(self._answer, parts, stays)

    def _answer(self, parts: tuple[bytes, ...], stays: bool) -> None:
        connection, _ = self._listener.accept()
        with connection:
            for part in parts[:-1]:
                connection.sendall(part)
                connection.recv(1 << 16)
            connection.sendall(parts[-1])
            if stays:
                connection.recv(1 << 16)


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar()
    yield liar
    liar.close()


CHALLENGE = msgspec.msgpack.encode(Challenge(bytes(32)))
GREETING = struct.pack(">I", len(CHALLENGE)) + CHALLENGE


@pytest.mark.parametrize(
    "parts",
    [
        (struct.pack(">I", (1 << 32) - 1),),
        (struct.pack(">I", MAX_FRAME_BYTES + 1),),
        (struct.pack(">I", 5) + b"\x91" * 5,),
        (struct.pack(">I", 20) + msgspec.msgpack.encode(Challenge(b"short" * 2)),),
        (GREETING, b"\0"),
    ],
    ids=range(5),
)
def test_a_holder_that_does_not_speak_the_protocol_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, liar: Liar, memory: Memory, parts: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(tcp, "PATIENCE_SECONDS", 0.2)
    liar.answer(*parts)
    with pytest.raises(TransferError):
        TcpPlane().reach(liar.peer, holder.offered.describe(7), memory)


def test_a_holder_that_stops_in_the_middle_is_given_up(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, liar: Liar, memory: Memory
) -> None:
    liar.answer(GREETING, b"\2", b"\0half")
    reached = TcpPlane().reach(liar.peer, holder.offered.describe(7), memory)
    assert isinstance(reached, tcp._ReachedOverTcp)
    monkeypatch.setattr(tcp, "PATIENCE_SECONDS", 0.2)  # not before: the liar may take its time to greet
    tcp._configure(reached._idle[0])
    with pytest.raises(TransferError, match=r"none of its bytes came for 0\.2 seconds"):
        reached.read([Run(0, 0, 100)], never)
    reached.close()


def test_a_holder_that_leaves_in_the_middle_is_named(holder: Holder, liar: Liar, memory: Memory) -> None:
    liar.answer(GREETING, b"\2", b"\0half", stays=False)
    reached = TcpPlane().reach(liar.peer, holder.offered.describe(7), memory)
    with pytest.raises(TransferError, match="the other side closed it"):
        reached.read([Run(0, 0, 100)], never)
    reached.close()


def test_nobody_at_the_port_is_named(holder: Holder, memory: Memory) -> None:
    nobody = HeldPort("127.0.0.1")
    with pytest.raises(TransferError, match="no data connection to it can be opened"):
        TcpPlane().reach(Peer("127.0.0.1", nobody.port), holder.offered.describe(7), memory)
    nobody.release()
