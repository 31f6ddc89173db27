"""What a consumer and a producer say to each other about blocks, and how: the control channel.

A connection carries frames, each the length of its body (4 bytes, big-endian) and the body, one msgpack message. The
consumer says Hello and is told Welcome or Refused. Then, for each request, it says Claim (told Granted or Refused), Copied
after each load (told Whole or Refused), and Release, which nobody answers. Answers come in the order of the questions. The end
of a connection releases all that was claimed on it.

Whatever comes in is bounded and checked; what isn't understood ends the connection it came on.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque
from typing import Annotated, Generic, TypeVar

import msgspec

from chiasm.kv_transfer.base import KVLayout
from chiasm.wire import MAX_BLOCKS, Name, TokenId

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20
"""A claim of two hundred thousand blocks fits."""
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES
"""Of one connection, before the other side counts as gone."""
MAX_CLAIM_SECONDS = 86_400.0
_RECEIVE_BYTES = 1 << 16
_LENGTH = struct.Struct(">I")
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A host that vanished is noticed within half a minute."""

ClaimNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First on a connection: what the consumer takes the producer for. ``engine_id`` is the producer's."""

    version: int
    connector: Name
    engine_id: Name
    fingerprint: Name
    layout: KVLayout


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """The two fit; ``memory`` tells the connector how to reach the producer's blocks."""

    num_blocks: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    memory: bytes


class Claim(msgspec.Struct, tag="claim", frozen=True):
    """Hold the blocks of a handle. ``claim`` numbers it, once on a connection."""

    claim: ClaimNumber
    request_id: Name
    block_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_BLOCKS)]
    seconds_left: Annotated[float, msgspec.Meta(ge=0, le=MAX_CLAIM_SECONDS)]
    """Until the consumer's request fails, and the blocks may go."""


class Granted(msgspec.Struct, tag="granted", frozen=True):
    """The blocks are held."""

    claim: ClaimNumber


class Copied(msgspec.Struct, tag="copied", frozen=True):
    """The blocks of one load were read. Were they still held?"""

    claim: ClaimNumber
    load: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Whole(msgspec.Struct, tag="whole", frozen=True):
    """They were: what was read is what was offered."""

    claim: ClaimNumber
    load: int


class Release(msgspec.Struct, tag="release", frozen=True):
    """The blocks are needed no longer."""

    claim: ClaimNumber


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """A claim, or without one the whole connection, was refused or lost; ``reason`` is a part of a sentence."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]
    claim: ClaimNumber | None = None


Question = Hello | Claim | Copied | Release
Answer = Welcome | Granted | Whole | Refused

_Incoming = TypeVar("_Incoming")
_Item = TypeVar("_Item")


class ChannelClosed(Exception):
    """The connection has ended or must end; ``str(error)`` says why."""


class Channel(Generic[_Incoming]):
    """One end of a connection. The owner closes it when any method raised ChannelClosed."""

    def __init__(self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[_Incoming]) -> None:
        self.socket = connection
        self._decoder = decoder
        self._received = bytearray()
        self._unsent = bytearray()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[_Incoming]:
        """The messages that are whole by now, after one read; may be none."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("the connection was closed")
        self._received += data
        messages: list[_Incoming] = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_FRAME_BYTES:
                raise ChannelClosed(f"a message of {length} bytes came, and {MAX_FRAME_BYTES} are allowed")
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            try:
                messages.append(self._decoder.decode(memoryview(self._received)[_LENGTH.size : end]))
            except msgspec.MsgspecError as error:
                raise ChannelClosed(f"a message came that is not understood: {error}") from error
            del self._received[:end]
        return messages

    def send(self, *messages: Question | Answer) -> None:
        """Send now what the socket takes, and the rest with the next :meth:`flush`."""
        for message in messages:
            body = msgspec.msgpack.encode(message)
            if len(body) > MAX_FRAME_BYTES:
                raise ValueError(f"a message of {len(body)} bytes is more than the {MAX_FRAME_BYTES} that are allowed")
            self._unsent += _LENGTH.pack(len(body)) + body
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise ChannelClosed("the other side does not read what it is told")
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def close(self) -> None:
        self.socket.close()


class Inbox(Generic[_Item]):
    """What other threads tell one that waits in a selector, to which ``socket`` becomes readable."""

    def __init__(self) -> None:
        self.socket, self._ringer = socket.socketpair()
        self.socket.setblocking(False)
        self._ringer.setblocking(False)
        self._items: deque[_Item] = deque()

    def put(self, item: _Item) -> None:
        """From any thread; never waits."""
        self._items.append(item)
        with contextlib.suppress(OSError):  # full, so it rings already; or closed
            self._ringer.send(b"!")

    def take(self) -> list[_Item]:
        """What came since the last call. Only for the thread that waits."""
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)
        items: list[_Item] = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def close(self) -> None:
        self.socket.close()
        self._ringer.close()
